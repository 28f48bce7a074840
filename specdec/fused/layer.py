"""Launches of the decoder layer's kernels: norm, gated activation, rotary placing, products of a few rows.

The CUDA twin of `specdec.native`: one launch for what torch does in three to eight. Callers ask `applies` first.
Dimension legend: B requests, N rows, W width, D head size.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from specdec.fused.available import applies

WIDEST = 16384  # one program holds a row
FEW = 4  # rows up to which a product reads its matrix at the memory's speed without tensor cores
MOST = 2**25  # elements of a matrix; cuBLAS reads larger ones as fast
SHORT, LONG, WIDE = 1024, 4096, 16384  # inputs of one step; inputs that may be gated again and again; outputs
GATE_BLOCK = 512
PLACED = 4  # heads of one program


@functools.cache
def _kernels() -> Any:
    from specdec.fused import layer_kernels

    return layer_kernels


def can_norm(x: Tensor, width: int) -> bool:
    """Is there a kernel for rows of this width?"""
    return applies(x) and width <= WIDEST


def norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. [..., W] -> [..., W]

    Args:
        out: where to write, rows evenly apart (a slice of a wider tensor); a new tensor when None.
    """
    rows = x.contiguous()
    width = x.shape[-1]
    y = torch.empty_like(rows) if out is None else out
    block = 1 << (width - 1).bit_length()
    warps = min(max(block // 512, 1), 8)
    _kernels().norm_kernel[(rows.numel() // width,)](
        rows,
        weight,
        y,
        width,
        y.stride(-2) if y.dim() > 1 else width,
        eps,
        BLOCK=block,
        num_warps=warps,
        enable_fp_fusion=True,
    )
    return y


def gate(x: Tensor) -> Tensor:
    """silu(first half) * second half of the last dimension. [..., 2W] -> [..., W]"""
    rows = x.contiguous()
    width = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], width)
    grid = (y.numel() // width, -(-width // GATE_BLOCK))
    _kernels().gate_kernel[grid](rows, y, width, BLOCK=GATE_BLOCK, num_warps=4, enable_fp_fusion=True)
    return y


def can_place(heads: Tensor, plane: Tensor) -> bool:
    """Can new heads be turned and stored in this plane of a cache in one pass?"""
    return applies(plane) and heads.dtype == plane.dtype and plane.shape[-1] % 2 == 0


def place(
    heads: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, plane: Tensor, slots: Tensor, indices: Tensor
) -> None:
    """Turn queries in place; turn keys and store them, and values.

    Args:
        heads: [B, N, query heads + 2 * KV heads, D], contiguous: queries, then keys, then values.
        cos, sin: [positions, D], dense tables, the sine of the first half negated.
        positions: int64 [B, N].
        plane: [2, slots, KV heads, length, D], one layer of a cache.
        slots: int64 [B]; indices: int64 [B, N] rows to store at.
    """
    assert heads.is_contiguous(), "heads in pieces"
    b, n, count, size = heads.shape
    kv_heads, half = plane.shape[2], size // 2
    keys, values = plane[0], plane[1]
    _kernels().place_kernel[(b * n, -(-count // PLACED))](
        heads, cos, sin, positions.contiguous(), keys, values, slots.contiguous(), indices.contiguous(), n,
        keys.stride(0), keys.stride(1), keys.stride(2), TURNED=count - kv_heads, QUERIES=count - 2 * kv_heads,
        KV_HEADS=kv_heads, HALF=half, BLOCK_HEADS=PLACED, BLOCK_HALF=1 << (half - 1).bit_length(),
        num_warps=2, enable_fp_fusion=True,
    )  # fmt: skip


def can_multiply(x: Tensor, weight: Tensor, gated: bool = False) -> bool:
    """Does `product` take rows x [..., W] better than cuBLAS does (bench/products.py)?

    A few rows, matrices that are soon read; and the gated activation, which every program repeats, only where it is
    short.
    """
    outputs, inputs = weight.shape
    return (
        applies(x)
        and x.dtype == weight.dtype
        and 0 < math.prod(x.shape[:-1]) <= FEW
        and weight.numel() <= MOST
        and (outputs <= WIDE or inputs > SHORT)
        and not (gated and inputs > LONG)
    )


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, plus: Tensor | None = None,
    factor: Tensor | None = None, eps: float = 0.0, gated: bool = False, blocks: tuple[int, int, int] | None = None,
) -> Tensor:  # fmt: skip
    """before(x) W^T + bias + plus for a few rows, in one launch.

    Args:
        x: [..., inputs], or [..., 2 * inputs] where `gated`: then the gated activation comes first.
        weight: [outputs, inputs]; bias: [outputs] or None.
        plus: [..., outputs], added at the end.
        factor: weight [inputs] of a norm of `eps` that comes first.
        blocks: outputs and inputs of one step and warps of a program, to try others than `blocks_for` picks.

    Returns: [..., outputs] of x's dtype. Sums are float32.
    """
    outputs, inputs = weight.shape
    rows = x.contiguous()
    count = rows.numel() // rows.shape[-1]
    y = x.new_empty(*x.shape[:-1], outputs)
    padded = 1 << (count - 1).bit_length()
    out, into, warps = blocks or blocks_for(inputs, outputs, padded)
    _kernels().product_kernel[(-(-outputs // out),)](
        rows, weight, bias, None if plus is None else plus.contiguous(), factor, y, count, inputs, outputs, eps,
        ROWS=padded, GATED=gated, BLOCK_OUT=out, BLOCK_IN=into, num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    return y


def blocks_for(inputs: int, outputs: int, rows: int) -> tuple[int, int, int]:
    """Outputs and inputs of a step, warps: enough programs for every multiprocessor, long loads for each thread."""
    if inputs <= SHORT:
        return (4 if outputs <= WIDE else 8), 1 << (inputs - 1).bit_length(), 4
    return 2, (2048 if rows <= 2 else 1024), 4
