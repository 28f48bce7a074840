"""The Triton kernels of a layer's products of few rows, with what comes before and after them.

Imported only by functions that are about to launch or compile them, because it imports triton. Shapes of all:
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
from specdec.fused.turns_kernels import is_last

AHEAD = tl.constexpr(2**15)  # elements of a matrix that one program fetches ahead whole


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


@triton.jit(do_not_specialize=["rows", "splits"])
def rows_kernel(
    x, weight, bias, plus, factor, y, partial, turns, x_tiles, tiles, rows, inputs, outputs, ahead, splits, eps,
    PAIRED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """At most BLOCK_ROWS rows, in tensor cores: every program reads its part of the matrix once, and as much of x.

    Grid (blocks of outputs, splits of the inputs); BLOCK_OUT divides `outputs`. x is read once for every block, so that
    large matrices want wide ones, and the inputs split to have enough: a block's programs leave their sums, float32, in
    partial [splits, BLOCK_ROWS, lines], and the last of them adds all in their order. turns int32 [blocks] is zero
    before and after; without it there is one split. No norm goes with splits.

    Given descriptors x_tiles [BLOCK_ROWS, BLOCK_IN] and tiles [BLOCK_OUT, BLOCK_IN], the copy engine fetches, and no
    norm comes first. A short matrix is fetched into the L2 cache before waiting, of a long one `ahead` of every line.
    """
    first, split = tl.program_id(0) * BLOCK_OUT, tl.program_id(1)
    out, row, column = first + tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_IN)
    share = tl.cdiv(tl.cdiv(inputs, BLOCK_IN), splits) * BLOCK_IN
    begin = split * share
    end = tl.minimum(inputs, begin + share)
    _fetch_block(weight, first, inputs, begin, end, ahead, BLOCK_OUT)
    if PAIRED:
        _fetch_block(weight, outputs + first, inputs, begin, end, ahead, BLOCK_OUT)
    kept = (row < rows)[:, None] & (out < outputs)[None, :]
    matrix, pairs = weight + out[None, :] * inputs, weight + (outputs + out)[None, :] * inputs
    wait_for_others()
    if tiles is not None:
        acc, beside = _sums_of_tiles(x_tiles, tiles, first, outputs + first, begin, end, PAIRED, BLOCK_ROWS, BLOCK_OUT,
                                     BLOCK_IN, STAGES)  # fmt: skip
    else:
        acc, beside = _sums(x + row[:, None] * inputs, (row < rows)[:, None], matrix, pairs, factor, column, begin,
                            end, inputs, eps, PAIRED, BLOCK_ROWS, BLOCK_OUT, BLOCK_IN, STAGES)  # fmt: skip
    last = True
    if turns is not None:
        lines = outputs * 2 if PAIRED else outputs
        spot, step = partial + row[:, None] * lines + out[None, :], BLOCK_ROWS * lines
        tl.store(spot + split * step, acc)
        if PAIRED:
            tl.store(spot + split * step + outputs, beside)
        last = is_last(turns + tl.program_id(0), splits)
    if last:
        if turns is not None:
            acc, beside = _gathered(spot, step, splits), _gathered(spot + outputs * PAIRED, step, splits)
        _finish(acc, beside, bias, plus, y, row, out, kept, outputs, PAIRED)


@triton.jit
def _sums(
    x, alive, matrix, pairs, factor, column, begin, end, inputs, eps, PAIRED: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Products of inputs begin..end, behind the norm if there is one (then these are all): [BLOCK_ROWS, BLOCK_OUT]."""
    squares = tl.zeros([BLOCK_ROWS, BLOCK_IN], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_OUT], tl.float32)
    beside = acc
    for start in tl.range(begin, end, BLOCK_IN, num_stages=STAGES):
        at = start + column
        inside = at < inputs
        value = tl.load(x + at[None, :], mask=alive & inside[None, :], other=0.0)
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
    return acc, beside


@triton.jit
def _sums_of_tiles(
    x_tiles, tiles, first, pair, begin, end, PAIRED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`_sums` without a norm. The matrix is the left factor: it has rows enough for a warp group, x may not."""
    acc = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
    beside = acc
    for start in tl.range(begin, end, BLOCK_IN, num_stages=STAGES):
        value = x_tiles.load([0, start]).T
        acc = tl.dot(tiles.load([first, start]), value, acc, input_precision="ieee")
        if PAIRED:
            beside = tl.dot(tiles.load([pair, start]), value, beside, input_precision="ieee")
    return acc.T, beside.T


@triton.jit
def _fetch_block(weight, first, inputs, begin, end, ahead, BLOCK_OUT: tl.constexpr):
    """Bring lines of the matrix from `first` on into the L2 cache: all of short ones, else how a share begins."""
    block = weight + first.to(tl.int64) * inputs
    if BLOCK_OUT * inputs <= AHEAD:
        fetch_ahead(block, 0, BLOCK_OUT * inputs, 1)
    else:
        fetch_ahead(block + begin, inputs, tl.minimum(end - begin, ahead), BLOCK_OUT)


@triton.jit
def _gathered(spot, step, splits):
    """The sum of what all programs of a block have left, always in one order."""
    total = tl.load(spot, cache_modifier=".cg")
    for split in range(1, splits):
        total += tl.load(spot + split * step, cache_modifier=".cg")
    return total


@triton.jit
def _finish(acc, beside, bias, plus, y, row, out, kept, outputs, PAIRED: tl.constexpr):
    """Bias, activation, residual; rounded and stored."""
    there = out < outputs
    made = acc + _more(bias, out, there)[None, :]
    if PAIRED:
        made = _activated(made, beside + _more(bias, out + outputs, there)[None, :], y)
    spot = row[:, None] * outputs + out[None, :]
    _put(made, _more(plus, spot, kept), y, spot, kept)


@triton.jit(do_not_specialize=["rows"])
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
    acc = tl.sum(tl.dot(value, block, input_precision="ieee"), 0) * scale
    beside = acc
    if PAIRED:
        beside = tl.sum(tl.dot(value, pair, input_precision="ieee"), 0) * scale
    _finish(acc, beside, bias, plus, y, row, out, alive[:, None] & there[None, :], outputs, PAIRED)


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
