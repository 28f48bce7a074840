"""Launches of the decoder layer's kernels: norm, gated activation, rotary placing.

The CUDA twin of `specdec.native`: one launch for what torch does in three to eight. Callers ask `applies` first.
Dimension legend: B requests, N rows, W width, D head size.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from specdec.fused.available import applies, launching, overlaps, power

WIDEST = 16384  # one program holds a row
GATE_BLOCK, LOOKUP_BLOCK = 512, 1024
PLACED = 4  # heads of one program
FETCHERS = 128  # programs that fetch what comes after attention
SHARE = 0.6  # of the L2 cache that may be filled ahead


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
    _kernels().norm_kernel[(rows.numel() // width,)](
        rows,
        weight,
        y,
        width,
        y.stride(-2) if y.dim() > 1 else width,
        eps,
        **_whole_row(width),
        **launching(),
    )
    return y


def two_norms(x: Tensor, weight: Tensor, other: Tensor, other_weight: Tensor, eps: float) -> Tensor:
    """Two tensors of one shape [..., W] through a norm each, side by side: [..., 2W]."""
    x, other = x.contiguous(), other.contiguous()
    width = x.shape[-1]
    y = x.new_empty(*x.shape[:-1], 2 * width)
    _kernels().two_norms_kernel[(x.numel() // width, 2)](
        x, weight, other, other_weight, y, width, eps, **_whole_row(width), **launching()
    )
    return y


def _whole_row(width: int) -> dict[str, int]:
    """What kernels that take a row at once are cut in."""
    block = power(1, width)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 8)}


def lookup(tokens: Tensor, table: Tensor) -> Tensor:
    """Rows of a dense table [V, W] by tokens int64 [...]: [..., W]. A token out of range reads what it should not."""
    width = table.shape[1]
    y = table.new_empty(*tokens.shape, width)
    _kernels().lookup_kernel[(tokens.numel(), -(-width // LOOKUP_BLOCK))](
        tokens.contiguous(), table, y, width, BLOCK=LOOKUP_BLOCK, num_warps=4, **launching()
    )
    return y


def gate(x: Tensor) -> Tensor:
    """silu(first half) * second half of the last dimension. [..., 2W] -> [..., W]"""
    rows = x.contiguous()
    width = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], width)
    grid = (y.numel() // width, -(-width // GATE_BLOCK))
    _kernels().gate_kernel[grid](rows, y, width, BLOCK=GATE_BLOCK, num_warps=4, **launching())
    return y


def can_place(heads: Tensor, plane: Tensor) -> bool:
    """Can new heads be turned and stored in this plane of a cache in one pass?"""
    return applies(plane) and heads.dtype == plane.dtype and plane.shape[-1] % 2 == 0


def place(
    heads: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, plane: Tensor, slots: Tensor, indices: Tensor,
    ahead: Tensor | None = None,
) -> None:  # fmt: skip
    """Turn queries in place; turn keys and store them, and values.

    Args:
        heads: [B, N, query heads + 2 * KV heads, D], contiguous: queries, then keys, then values.
        cos, sin: [positions, D], dense tables, the sine of the first half negated.
        positions: int64 [B, N].
        plane: [2, slots, KV heads, length, D], one layer of a cache.
        slots: int64 [B]; indices: int64 [B, N] rows to store at.
        ahead: a matrix to bring into the L2 cache meanwhile.
    """
    assert heads.is_contiguous(), "heads in pieces"
    b, n, count, size = heads.shape
    kv_heads, half = plane.shape[2], size // 2
    keys, values, blocks = plane[0], plane[1], -(-count // PLACED)
    # measured on an H200: this gains 1% for one row, and loses as much for 64
    fetched = _fetchable(ahead) if ahead is not None and b * n == 1 else 0
    fetchers = FETCHERS if fetched else 0
    _kernels().place_kernel[(b * n, blocks + fetchers)](
        heads, cos, sin, positions.contiguous(), keys, values, slots.contiguous(), indices.contiguous(),
        ahead if fetched else None, fetched, n, keys.stride(0), keys.stride(1), keys.stride(2),
        TURNED=count - kv_heads, QUERIES=count - 2 * kv_heads, KV_HEADS=kv_heads, HALF=half, BLOCK_HEADS=PLACED,
        BLOCK_HALF=1 << (half - 1).bit_length(), BLOCKS=blocks, FETCHERS=fetchers, num_warps=2, **launching(),
    )  # fmt: skip


def _fetchable(matrix: Tensor) -> int:
    """Elements of a dense matrix that are worth fetching: in whole 16 bytes, and leaving room in the L2 cache."""
    most = int(SHARE * _cache_bytes(matrix.device)) // matrix.element_size() // 8 * 8
    return 0 if matrix.data_ptr() % 16 or not overlaps() else min(matrix.numel() // 8 * 8, most)


@functools.cache
def _cache_bytes(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0
