"""The Triton kernels of a layer's products of few rows, with what comes before and after them.

Imported only by functions that are about to launch or compile them, because it imports triton. Shapes of both:
x [rows, inputs], weight [outputs, inputs], y and the residual `plus` [rows, outputs], all dense, `bias` [outputs], and
`factor` [inputs], the weight of a norm that comes first; None drops the code of each. Where PAIRED, the weight and the
bias have twice as many rows, and a gated activation makes one output of each pair o, outputs + o.

A norm scales a whole row, so that its scale can come last: it is found on the way. Nobody writes weights: the first of
them are read before waiting.
"""
# mypy: ignore-errors
# (the bodies are Triton's own language, and triton carries no types)

from __future__ import annotations

import triton
import triton.language as tl

from specdec.fused.layer_kernels import activated
from specdec.fused.overlap_kernels import fetch_ahead, wait_for_others

AHEAD = tl.constexpr(2**15)  # elements that one program fetches ahead at most


@triton.jit
def row_kernel(
    x, weight, bias, plus, factor, y, inputs, outputs, eps,
    PAIRED: tl.constexpr, WHOLE: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """One row, outside the tensor cores: every program reads its rows of the matrix once, and all of x.

    Grid (blocks of outputs,). The normed row is never rounded. WHOLE: one step takes all inputs.
    """
    out, column = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_IN)
    there = out < outputs
    matrix = weight + out.to(tl.int64)[:, None] * inputs
    pairs = matrix + outputs.to(tl.int64) * inputs
    fits = there[:, None] & (column < inputs)[None, :]
    block = tl.load(matrix + column[None, :], mask=fits, other=0.0)
    if PAIRED:
        pair = tl.load(pairs + column[None, :], mask=fits, other=0.0)
    wait_for_others()
    if WHOLE:
        value, squares = _before(x, factor, column, inputs)
        made = tl.sum(value[None, :] * block.to(tl.float32), 1)
        if PAIRED:
            beside = tl.sum(value[None, :] * pair.to(tl.float32), 1)
    else:
        squares = tl.zeros([BLOCK_IN], tl.float32)
        acc = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)  # summed up once, at the end
        acc_pair = acc
        for start in range(0, inputs, BLOCK_IN):
            value, square = _before(x, factor, start + column, inputs)
            squares += square
            acc += value[None, :] * block.to(tl.float32)
            at = start + BLOCK_IN + column
            fits = there[:, None] & (at < inputs)[None, :]
            block = tl.load(matrix + at[None, :], mask=fits, other=0.0)
            if PAIRED:
                acc_pair += value[None, :] * pair.to(tl.float32)
                pair = tl.load(pairs + at[None, :], mask=fits, other=0.0)
        made = tl.sum(acc, 1)
        if PAIRED:
            beside = tl.sum(acc_pair, 1)
    scale = 1.0
    if factor is not None:
        scale = tl.rsqrt(tl.sum(squares, 0) / inputs + eps)
    made = made * scale + _more(bias, out, there)
    if PAIRED:
        made = _activated(made, beside * scale + _more(bias, out + outputs, there), y)
    _put(made, _more(plus, out, there), y, out, there)


@triton.jit
def rows_kernel(
    x, weight, bias, plus, factor, y, rows, inputs, outputs, eps,
    PAIRED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """At most BLOCK_ROWS rows, in tensor cores: every program reads its rows of the matrix once, and all of x.

    Grid (blocks of outputs,); BLOCK_OUT divides `outputs`. A short matrix is fetched into the L2 cache before waiting;
    of a long one, what the programs fetched would drive out each other's.
    """
    first = tl.program_id(0) * BLOCK_OUT
    ahead = tl.where(BLOCK_OUT * inputs <= AHEAD, BLOCK_OUT * inputs, 0)
    fetch_ahead(weight + first.to(tl.int64) * inputs, ahead, 64)
    if PAIRED:
        fetch_ahead(weight + (outputs + first).to(tl.int64) * inputs, ahead, 64)
    out, row, column = first + tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_IN)
    there, alive = out < outputs, (row < rows)[:, None]
    matrix, pairs = weight + out[None, :] * inputs, weight + (outputs + out)[None, :] * inputs
    wait_for_others()
    squares = tl.zeros([BLOCK_ROWS, BLOCK_IN], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_OUT], tl.float32)
    beside = acc
    for start in tl.range(0, inputs, BLOCK_IN, num_stages=STAGES):
        at = start + column
        inside = at < inputs
        value = tl.load(x + row[:, None] * inputs + at[None, :], mask=alive & inside[None, :], other=0.0)
        block = tl.load(matrix + at[:, None], mask=inside[:, None], other=0.0)
        if factor is not None:
            wide = value.to(tl.float32)
            squares += wide * wide
            by = tl.load(factor + at, mask=inside, other=0.0).to(tl.float32)
            value = (wide * by[None, :]).to(value.dtype)
        acc = tl.dot(value, block, acc, input_precision="ieee")
        if PAIRED:
            pair = tl.load(pairs + at[:, None], mask=inside[:, None], other=0.0)
            beside = tl.dot(value, pair, beside, input_precision="ieee")
    if factor is not None:
        scale = tl.rsqrt(tl.sum(squares, 1) / inputs + eps)[:, None]
        acc *= scale
        beside *= scale
    made = acc + _more(bias, out, there)[None, :]
    if PAIRED:
        made = _activated(made, beside + _more(bias, out + outputs, there)[None, :], y)
    spot, kept = row[:, None] * outputs + out[None, :], alive & there[None, :]
    _put(made, _more(plus, spot, kept), y, spot, kept)


@triton.jit
def whole_rows_kernel(
    x, weight, bias, plus, factor, y, rows, inputs, outputs, eps,
    PAIRED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """At most BLOCK_ROWS rows, in tensor cores, all inputs in one step: PARTS products of BLOCK_IN that warps share.

    Grid (blocks of outputs,); BLOCK_OUT divides `outputs`. Nothing is waited for twice: the matrix is on its way to
    registers before the kernel before is done, and one step of a short matrix takes as long as one of many.
    """
    out, row = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_ROWS)
    at = tl.arange(0, PARTS)[:, None] * BLOCK_IN + tl.arange(0, BLOCK_IN)[None, :]
    inside, alive, there = at < inputs, row < rows, out < outputs
    matrix = weight + out[None, None, :] * inputs + at[:, :, None]
    block = tl.load(matrix, mask=inside[:, :, None], other=0.0)
    if PAIRED:
        pair = tl.load(matrix + outputs * inputs, mask=inside[:, :, None], other=0.0)
    wait_for_others()
    fits = alive[None, :, None] & inside[:, None, :]
    value = tl.load(x + row[None, :, None] * inputs + at[:, None, :], mask=fits, other=0.0)
    scale = 1.0
    if factor is not None:
        wide = value.to(tl.float32)
        scale = tl.rsqrt(tl.sum(tl.sum(wide * wide, 2), 0) / inputs + eps)[:, None]
        by = tl.load(factor + at, mask=inside, other=0.0).to(tl.float32)
        value = (wide * by[:, None, :]).to(value.dtype)
    made = tl.sum(tl.dot(value, block, input_precision="ieee"), 0) * scale + _more(bias, out, there)[None, :]
    if PAIRED:
        beside = tl.sum(tl.dot(value, pair, input_precision="ieee"), 0) * scale
        made = _activated(made, beside + _more(bias, out + outputs, there)[None, :], y)
    spot, kept = row[:, None] * outputs + out[None, :], alive[:, None] & there[None, :]
    _put(made, _more(plus, spot, kept), y, spot, kept)


@triton.jit
def _before(x, factor, at, inputs):
    """Inputs of the row times the norm's weight, and their squares."""
    value = tl.load(x + at, mask=at < inputs, other=0.0).to(tl.float32)
    square = value * value
    if factor is not None:
        value *= tl.load(factor + at, mask=at < inputs, other=0.0).to(tl.float32)
    return value, square


@triton.jit
def _more(pointer, at, there):
    """What is added to outputs, if anything, in float32."""
    added = tl.zeros(at.shape, tl.float32)
    if pointer is not None:
        added = tl.load(pointer + at, mask=there, other=0.0).to(tl.float32)
    return added


@triton.jit
def _activated(gate, up, y):
    """The gated activation of two float32 products, rounded where separate launches would."""
    return activated(gate.to(y.dtype.element_ty), up.to(y.dtype.element_ty)).to(tl.float32)


@triton.jit
def _put(made, residual, y, at, there):
    """Round and store, on top of a residual, which rounds once more."""
    kind = y.dtype.element_ty
    tl.store(y + at, (made.to(kind).to(tl.float32) + residual).to(kind), mask=there)
