"""Products of a few rows with a large matrix on the CPU, each row's result independent of the rows beside it.

A single row is bound by memory, a tree of rows by arithmetic; the packed layout serves both. Sums are float32 and run
over the inputs in order, so verifying a tree gives, bit by bit, what decoding its paths one by one gives.
Dimension legend: M rows, K inputs, O outputs, P panels of sixteen outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from specdec.native.library import library

PANEL = 16  # as in vectors.h
DTYPES = (torch.float32, torch.bfloat16)


def can_multiply(weight: Tensor) -> bool:
    """Are there kernels, and is this a matrix they take?"""
    return weight.device.type == "cpu" and weight.dtype in DTYPES and library() is not None


def pack(weight: Tensor) -> Tensor:
    """[O, K] -> [P, K, 16]; outputs beyond O are zeros."""
    outputs, inputs = weight.shape
    panels = -(-outputs // PANEL)
    padded = F.pad(weight, (0, 0, 0, panels * PANEL - outputs))
    return padded.view(panels, PANEL, inputs).transpose(1, 2).contiguous()


def unpack(packed: Tensor, outputs: int) -> Tensor:
    """Inverse of `pack`. [P, K, 16] -> [O, K]"""
    panels, inputs, _ = packed.shape
    return packed.transpose(1, 2).reshape(panels * PANEL, inputs)[:outputs].contiguous()


def linear(x: Tensor, packed: Tensor, outputs: int, bias: Tensor | None = None) -> Tensor:
    """x [M, K] times packed weights, plus a bias [O] -> [M, O] in x's dtype.

    Raises:
        MemoryError: when there is none for a panel.
    """
    kernels = library()
    assert kernels is not None and x.shape[1] == packed.shape[1], (
        "packed without kernels, or for other inputs"
    )
    wide = x.float().contiguous()
    y = torch.empty(x.shape[0], outputs, dtype=x.dtype)
    added = None if bias is None else F.pad(bias.float(), (0, len(packed) * PANEL - outputs))
    failed = kernels.specdec_linear(
        wide.data_ptr(), packed.data_ptr(), None if added is None else added.data_ptr(), y.data_ptr(), x.shape[0],
        x.shape[1], outputs, packed.dtype == torch.bfloat16, x.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for a panel of weights")
    return y
