"""Products of a few rows with a large matrix on the CPU, each row's result independent of the rows beside it.

A single row is bound by memory, a tree of rows by arithmetic; the packed layout serves both. Sums are float32 and run
over the inputs in order, so verifying a tree gives, bit by bit, what decoding its paths one by one gives. Where the
processor multiplies bfloat16, such weights are packed in tiles; a tree of sixteen then costs hardly more than a token.
Dimension legend: M rows, K inputs, O outputs, P panels of sixteen outputs, T blocks of 32 inputs.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from specdec.native.library import library

PANEL = 16  # as in vectors.h
PAIRS = 16  # of inputs in a block of tiles.c
AVX512 = 1  # see `tiles_kind`
DTYPES = (torch.float32, torch.bfloat16)


def can_multiply(weight: Tensor) -> bool:
    """Are there kernels, and is this a matrix they take?"""
    return weight.device.type == "cpu" and weight.dtype in DTYPES and library() is not None


def tiles_kind() -> int:
    """What multiplies bfloat16 here: 2 AMX tiles, 1 AVX-512's pairs, 0 nothing."""
    kernels = library()
    return 0 if kernels is None else _asked(kernels)


@functools.cache
def _asked(kernels: ctypes.CDLL) -> int:
    return int(kernels.specdec_tiles_kind())


def told() -> str:
    """How bfloat16 is multiplied, in a few words."""
    return ("bfloat16 widened", "bfloat16 by AVX-512's pairs", "bfloat16 by AMX tiles")[tiles_kind()]


def pack(weight: Tensor) -> Tensor:
    """[O, K] -> [P, K, 16], or [P, T, 16, 16, 2] in tiles; outputs beyond O and inputs beyond K are zeros."""
    outputs, inputs = weight.shape
    panels = -(-outputs // PANEL)
    tiles = weight.dtype == torch.bfloat16 and tiles_kind() > 0
    padded = F.pad(weight, (0, -inputs % (2 * PAIRS) if tiles else 0, 0, panels * PANEL - outputs))
    if tiles:
        return padded.view(panels, PANEL, -1, PAIRS, 2).permute(0, 2, 3, 1, 4).contiguous()
    return padded.view(panels, PANEL, inputs).transpose(1, 2).contiguous()


def unpack(packed: Tensor, outputs: int, inputs: int) -> Tensor:
    """Inverse of `pack` -> [O, K]."""
    if packed.ndim == 5:
        packed = packed.permute(0, 3, 1, 2, 4).reshape(len(packed) * PANEL, -1)
    else:
        packed = packed.transpose(1, 2).reshape(len(packed) * PANEL, -1)
    return packed[:outputs, :inputs].contiguous()


def linear(x: Tensor, packed: Tensor, outputs: int, bias: Tensor | None = None) -> Tensor:
    """x [M, K] times packed weights, plus a bias [O] -> [M, O] in x's dtype; that of the weights where they are tiles.

    Raises:
        MemoryError: when there is none for a panel.
    """
    kernels = library()
    assert kernels is not None, "packed without kernels"
    y = torch.empty(x.shape[0], outputs, dtype=x.dtype)
    added = None if bias is None else F.pad(bias.float(), (0, len(packed) * PANEL - outputs))
    if packed.ndim == 5:
        blocks = packed.shape[1]
        assert x.dtype == torch.bfloat16 and -(-x.shape[1] // (2 * PAIRS)) == blocks, (
            "packed for other inputs"
        )
        spare = blocks * 2 * PAIRS - x.shape[1]
        x = F.pad(x, (0, spare)).contiguous() if spare else x.contiguous()
        kernels.specdec_tiles(
            x.data_ptr(), packed.data_ptr(), None if added is None else added.data_ptr(), y.data_ptr(), x.shape[0],
            blocks, outputs, tiles_kind(), torch.get_num_threads(),
        )  # fmt: skip
        return y
    assert x.shape[1] == packed.shape[1], "packed for other inputs"
    wide = x.float().contiguous()
    failed = kernels.specdec_linear(
        wide.data_ptr(), packed.data_ptr(), None if added is None else added.data_ptr(), y.data_ptr(), x.shape[0],
        x.shape[1], outputs, packed.dtype == torch.bfloat16, x.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for a panel of weights")
    return y
