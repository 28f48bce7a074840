"""The Triton kernels of a decoder layer: norm, gated activation, rotary placing, products of a few rows.

Imported only by functions that are about to launch or compile them, because it imports triton. The small ones round
where torch's operations would.
"""
# mypy: ignore-errors
# (the bodies are Triton's own language, and triton carries no types)

from __future__ import annotations

import triton
import triton.language as tl

from specdec.fused.overlap_kernels import wait_for_others


@triton.jit
def norm_kernel(x, weight, y, width, y_row, eps, BLOCK: tl.constexpr):
    """One row: x / sqrt(mean(x^2) + eps), rounded, times weight. x [R, width] dense; rows of y lie y_row apart."""
    wait_for_others()
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row * width + at, mask=inside, other=0.0)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    scaled = (wide * scale).to(value.dtype).to(tl.float32)
    factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * y_row + at, (scaled * factor).to(value.dtype), mask=inside)


@triton.jit
def gate_kernel(x, y, width, BLOCK: tl.constexpr):
    """silu(first half) * second half of rows of 2 * width. Grid (rows, blocks)."""
    wait_for_others()
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(x + row * 2 * width + at, mask=inside, other=0.0)
    up = tl.load(x + row * 2 * width + width + at, mask=inside, other=0.0)
    tl.store(y + row * width + at, _gated(gate, up), mask=inside)


@triton.jit
def _gated(gate, up):
    wide = gate.to(tl.float32)
    active = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    return (active.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)


@triton.jit
def place_kernel(
    heads, cos, sin, positions, keys, values, slots, indices, rows, kv_slot, kv_head, kv_row,
    TURNED: tl.constexpr, QUERIES: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """Some heads of one row: queries are turned where they are, keys turned and stored, values stored.

    Grid (B * N, blocks of heads). heads [B, N, QUERIES + 2 * KV_HEADS, 2 * HALF] dense; cos, sin [positions, 2 * HALF],
    the first half of the sine negated; positions, indices int64 [B, N]; keys, values [slots, KV_HEADS, length,
    2 * HALF] by strides.
    """
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


@triton.jit
def product_kernel(
    x, weight, bias, plus, factor, y, inputs, outputs, eps,
    GATED: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """y = before(x) W^T + bias + plus for one row: every program reads its rows of W once, and all of x.

    Grid (blocks of outputs,). x [inputs] (twice as long where GATED), weight [outputs, inputs], plus and y [outputs].
    `before` is the gated activation, or the norm of weight `factor`, or nothing; `bias`, `plus` and `factor` may
    be None, which drops their code. A norm scales the whole row, so that its scale can come last: it is found on the
    way, and the normed row is never rounded. Nobody writes weights: the first of them are read before waiting.
    """
    out, column = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_IN)
    there = out < outputs
    matrix = weight + out.to(tl.int64)[:, None] * inputs
    block = tl.load(matrix + column[None, :], mask=there[:, None] & (column < inputs)[None, :], other=0.0)
    wait_for_others()
    squares = tl.zeros([BLOCK_IN], tl.float32)
    acc = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)  # summed up once, at the end
    for start in range(0, inputs, BLOCK_IN):
        at = start + column
        value = tl.load(x + at, mask=at < inputs, other=0.0)
        if GATED:
            value = _gated(value, tl.load(x + inputs + at, mask=at < inputs, other=0.0))
        value = value.to(tl.float32)
        if factor is not None:
            squares += value * value
            value *= tl.load(factor + at, mask=at < inputs, other=0.0).to(tl.float32)
        acc += value[None, :] * block.to(tl.float32)
        at += BLOCK_IN
        block = tl.load(matrix + at[None, :], mask=there[:, None] & (at < inputs)[None, :], other=0.0)
    made = tl.sum(acc, 1)
    if factor is not None:
        made *= tl.rsqrt(tl.sum(squares, 0) / inputs + eps)
    if bias is not None:
        made += tl.load(bias + out, mask=there, other=0.0).to(tl.float32)
    if plus is not None:
        made = made.to(y.dtype.element_ty).to(tl.float32) + tl.load(plus + out, mask=there, other=0.0).to(
            tl.float32
        )
    tl.store(y + out, made.to(y.dtype.element_ty), mask=there)
