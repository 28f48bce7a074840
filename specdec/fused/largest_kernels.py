"""The Triton kernels that find the largest entry of long rows.

Imported only by functions that are about to launch or compile them, because it imports triton. Scores and indices
travel as words (see growth_kernels.py).
"""
# mypy: ignore-errors
# (the bodies are Triton's own language, and triton carries no types)

from __future__ import annotations

import triton
import triton.language as tl

from specdec.fused.growth_kernels import NOTHING, _index, _score, _words
from specdec.fused.overlap_kernels import wait_for_others


@triton.jit
def share_kernel(x, words, row_stride, width, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest entry of one share of one row. Grid (rows, SPLITS). x [R, width] by row stride, words int64
    [R, SPLITS]."""
    wait_for_others()
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = split * BLOCK + tl.arange(0, BLOCK)
    there = column < width
    value = tl.load(x + row * row_stride + column, mask=there, other=float("-inf")).to(tl.float32)
    tl.store(words + row * SPLITS + split, tl.max(tl.where(there, _words(value, column), NOTHING), 0))


@triton.jit
def largest_kernel(words, values, indices, SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr):
    """The largest of a row's shares. Grid (rows,). values float32 [R], indices int64 [R]."""
    wait_for_others()
    row, split = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_SPLITS)
    best = tl.max(tl.load(words + row * SPLITS + split, mask=split < SPLITS, other=NOTHING), 0)
    tl.store(values + row, _score(best))
    tl.store(indices + row, _index(best).to(tl.int64))
