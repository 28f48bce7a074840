"""The Triton kernels of a decoder layer around its products: norm, gated activation, rotary placing.

Imported only by functions that are about to launch or compile them, because it imports triton. The small ones round
where torch's operations would.
"""
# mypy: ignore-errors
# (the bodies are Triton's own language, and triton carries no types)

from __future__ import annotations

import triton
import triton.language as tl

from specdec.fused.overlap_kernels import fetch_ahead, wait_for_others


@triton.jit
def norm_kernel(x, weight, y, width, y_row, eps, BLOCK: tl.constexpr):
    """One row: x / sqrt(mean(x^2) + eps), rounded, times weight. x [R, width] dense; rows of y lie y_row apart."""
    wait_for_others()
    _norm(x, weight, y, tl.program_id(0).to(tl.int64), width, y_row, eps, BLOCK)


@triton.jit
def two_norms_kernel(x, weight, other, other_weight, y, width, eps, BLOCK: tl.constexpr):
    """One row of x or of other, each [R, width] dense, by its own norm, to its half of y [R, 2 * width].

    Grid (R, 2).
    """
    wait_for_others()
    row = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        _norm(x, weight, y, row, width, 2 * width, eps, BLOCK)
    else:
        _norm(other, other_weight, y + width, row, width, 2 * width, eps, BLOCK)


@triton.jit
def _norm(x, weight, y, row, width, y_row, eps, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row * width + at, mask=inside, other=0.0)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    scaled = (wide * scale).to(value.dtype).to(tl.float32)
    factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * y_row + at, (scaled * factor).to(value.dtype), mask=inside)


@triton.jit
def lookup_kernel(tokens, table, y, width, BLOCK: tl.constexpr):
    """A block of one token's row of table [V, width]. Grid (tokens, blocks). tokens int64 [R], y [R, width], dense."""
    wait_for_others()
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(table + tl.load(tokens + row) * width + at, mask=at < width, other=0.0)
    tl.store(y + row * width + at, value, mask=at < width)


@triton.jit
def gate_kernel(x, y, width, BLOCK: tl.constexpr):
    """silu(first half) * second half of rows of 2 * width. Grid (rows, blocks)."""
    wait_for_others()
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(x + row * 2 * width + at, mask=inside, other=0.0)
    up = tl.load(x + row * 2 * width + width + at, mask=inside, other=0.0)
    tl.store(y + row * width + at, activated(gate, up), mask=inside)


@triton.jit
def activated(gate, up):
    wide = gate.to(tl.float32)
    active = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    return (active.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)


@triton.jit
def place_kernel(
    heads, cos, sin, positions, keys, values, slots, indices, ahead, count, rows, kv_slot, kv_head, kv_row,
    TURNED: tl.constexpr, QUERIES: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCKS: tl.constexpr, FETCHERS: tl.constexpr,
):  # fmt: skip
    """Some heads of one row: queries are turned where they are, keys turned and stored, values stored.

    Grid (B * N, BLOCKS of heads + FETCHERS). heads [B, N, QUERIES + 2 * KV_HEADS, 2 * HALF] dense; cos, sin [positions,
    2 * HALF], the first half of the sine negated; positions, indices int64 [B, N]; keys, values [slots, KV_HEADS,
    length, 2 * HALF] by strides. Attention, which comes next, leaves the bus idle: the FETCHERS bring the `count`
    elements at `ahead`, of a matrix that is multiplied after it, into the L2 cache meanwhile. They have no heads,
    and are for a single row.
    """
    if FETCHERS > 0:  # noqa: SIM102 (this one is the compiler's)
        if tl.program_id(1) >= BLOCKS:
            share = tl.cdiv(tl.cdiv(count, FETCHERS), 8) * 8
            start = (tl.program_id(1) - BLOCKS).to(tl.int64) * share
            fetch_ahead(ahead + start, 0, tl.minimum(count - start, share).to(tl.int32), 1)
    wait_for_others()
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    dim = tl.arange(0, BLOCK_HALF)
    fits = (head < QUERIES + 2 * KV_HEADS)[:, None] & (dim < HALF)[None, :]
    at = heads + (row * (QUERIES + 2 * KV_HEADS) + head)[:, None] * (2 * HALF) + dim[None, :]
    low, high = tl.load(at, mask=fits, other=0.0), tl.load(at + HALF, mask=fits, other=0.0)
    angle = tl.load(positions + row) * (2 * HALF) + dim
    there = dim < HALF
    turned_low = _turn(low, high, cos, sin, angle, there)
    turned_high = _turn(high, low, cos, sin, angle + HALF, there)
    turns = (head < TURNED)[:, None]
    low, high = tl.where(turns, turned_low, low), tl.where(turns, turned_high, high)
    query = fits & (head < QUERIES)[:, None]
    tl.store(at, low, mask=query)
    tl.store(at + HALF, high, mask=query)
    slot, index = tl.load(slots + row // rows), tl.load(indices + row)
    kv = head - tl.where(head < TURNED, QUERIES, TURNED)
    to = (slot * kv_slot + index * kv_row + kv * kv_head)[:, None] + dim[None, :]
    key, value = fits & (head >= QUERIES)[:, None] & turns, fits & (head >= TURNED)[:, None]
    tl.store(keys + to, low, mask=key)
    tl.store(keys + to + HALF, high, mask=key)
    tl.store(values + to, low, mask=value)
    tl.store(values + to + HALF, high, mask=value)


@triton.jit
def _turn(x, other, cos, sin, at, there):
    by = tl.load(cos + at, mask=there, other=0.0).to(tl.float32)[None, :]
    across = tl.load(sin + at, mask=there, other=0.0).to(tl.float32)[None, :]
    product = (x.to(tl.float32) * by).to(x.dtype).to(tl.float32)
    return (product + other.to(tl.float32) * across).to(x.dtype)
