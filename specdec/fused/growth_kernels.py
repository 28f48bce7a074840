"""The Triton kernels of growing a tree: likeliest drafts, one level, re-ranking.

Imported only by functions that are about to launch or compile them, because it imports triton.

A score and the index it belongs to travel as one word, so that the largest word is the highest score and, among equals,
the lowest index; no two words are equal, which a selection by repeated maximum relies on (NaN has its place, too):

    bit 63 ... 32                       31 ... 0
    float32 as an integer of its order  LAST ^ index
"""
# mypy: ignore-errors
# (the bodies are Triton's own language, and triton carries no types)

from __future__ import annotations

import triton
import triton.language as tl

from specdec.fused.overlap_kernels import wait_for_others

FLIP = tl.constexpr(0x7FFFFFFF)  # of a negative float32: every bit but the sign
LAST = tl.constexpr(0x7FFFFFFF)
NAN = tl.constexpr(0x7FC00000)
LEAST = tl.constexpr(-0x80000000)  # of int32
NOTHING = tl.constexpr(-0x8000000000000000)  # of words: below every score


@triton.jit
def _ordered(x):
    """float32 as int32 of the same order; the two zeros are one, and what is no number is above all."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, NAN, tl.where(bits < 0, bits ^ FLIP, bits))


@triton.jit
def _words(x, index):
    """Scores float32 and their indices int32 as words."""
    return (_ordered(x).to(tl.int64) << 32) | (index ^ LAST).to(tl.int64)


@triton.jit
def _score(word):
    """The score of a word."""
    bits = (word >> 32).to(tl.int32)
    return tl.where(bits < 0, bits ^ FLIP, bits).to(tl.float32, bitcast=True)


@triton.jit
def _index(word):
    """The index of a word."""
    return ((word & LAST) ^ LAST).to(tl.int32)


@triton.jit
def _best(words, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """The `WIDTH` largest words of each row, falling: [rows, n] -> [rows, BLOCK_WIDTH]."""
    place = tl.arange(0, BLOCK_WIDTH)[None, :]
    best = tl.full([words.shape[0], BLOCK_WIDTH], NOTHING, tl.int64)
    for turn in range(WIDTH):
        peak = tl.max(words, 1)[:, None]
        best = tl.where(place == turn, peak, best)
        words = tl.where(words == peak, NOTHING, words)
    return best


@triton.jit
def shares_kernel(logits, words, peaks, totals, row_stride, vocabulary, SPLITS: tl.constexpr, WIDTH: tl.constexpr,
                  BLOCK: tl.constexpr, BLOCK_WIDTH: tl.constexpr):  # fmt: skip
    """One share of one row's vocabulary: its likeliest drafts, and its part of the softmax.

    Grid (rows, splits). logits [R, Vd] by row stride; words int64 [R, SPLITS, WIDTH], peaks and totals float32
    [R, SPLITS]: the largest logit and the sum of exp(logit - largest).
    """
    wait_for_others()
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = split * BLOCK + tl.arange(0, BLOCK)
    there = column < vocabulary
    x = tl.load(logits + row * row_stride + column, mask=there, other=float("-inf")).to(tl.float32)
    peak = tl.max(x, 0)
    pivot = tl.where(peak == float("-inf"), 0.0, peak)
    at = row * SPLITS + split
    tl.store(peaks + at, peak)
    tl.store(totals + at, tl.sum(tl.exp(x - pivot), 0))
    best = _best(tl.where(there, _words(x, column), NOTHING)[None, :], WIDTH, BLOCK_WIDTH)
    place = tl.arange(0, BLOCK_WIDTH)[None, :]
    tl.store(words + at * WIDTH + place, best, mask=place < WIDTH)


@triton.jit
def _merged(words, peaks, totals, first, alive, row, SPLITS: tl.constexpr, WIDTH: tl.constexpr,
            BLOCK_SPLITS: tl.constexpr, BLOCK_WORDS: tl.constexpr, BLOCK_WIDTH: tl.constexpr):  # fmt: skip
    """(log-probabilities float32, draft ids int32) [rows, BLOCK_WIDTH] of the likeliest drafts of each row."""
    split, one = tl.arange(0, BLOCK_SPLITS)[None, :], tl.arange(0, BLOCK_WORDS)[None, :]
    at = (first + row)[:, None] * SPLITS
    some = alive[:, None] & (split < SPLITS)
    peak = tl.load(peaks + at + split, mask=some, other=float("-inf"))
    highest = tl.max(peak, 1)[:, None]
    pivot = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.load(totals + at + split, mask=some, other=0.0) * tl.exp(peak - pivot), 1)
    given = tl.load(words + at * WIDTH + one, mask=alive[:, None] & (one < SPLITS * WIDTH), other=NOTHING)
    best = _best(given, WIDTH, BLOCK_WIDTH)
    return _score(best) - pivot - tl.log(total)[:, None], _index(best)


@triton.jit
def _follow(y, new_y, request, parent, hidden, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
            BLOCK_HIDDEN: tl.constexpr):  # fmt: skip
    """Copy this program's block of the parents' outputs [K', H] to the new frontier [WIDTH, H]."""
    place, dim = (
        tl.arange(0, BLOCK_WIDTH)[:, None],
        tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)[None, :],
    )
    mask = (place < WIDTH) & (dim < hidden)
    value = tl.load(y + (request * ROWS + parent)[:, None] * hidden + dim, mask=mask, other=0.0)
    tl.store(new_y + (request * WIDTH + place) * hidden + dim, value, mask=mask)


@triton.jit(do_not_specialize=["count", "before"])
def level_kernel(
    words, peaks, totals, ids, old_scores, old_at, old_bits, y, tokens, scores, parents,
    new_tokens, new_scores, new_at, new_bits, new_y, count, before, capacity, hidden,
    ROWS: tl.constexpr, SPLITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr, BLOCK_WORDS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    """One level of one request: ROWS x WIDTH candidates, in parent-major order, and the WIDTH that grow on.

    Grid (requests, blocks of hidden): all find and write the same, and each copies a block of its own; one program
    would copy them one after another. words, peaks, totals of `shares_kernel`; ids int64 [Vd]; the frontier's
    old_scores float32, old_at and old_bits int64 [B, ROWS], None at the first level; y and new_y [B, ROWS | WIDTH,
    hidden]. Candidates are written to tokens, scores, parents [B, capacity] from `count` on, the new frontier to
    new_* [B, WIDTH]; `before` head rows precede its own.
    """
    wait_for_others()
    request = tl.program_id(0).to(tl.int64)
    row, place = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_WIDTH)
    alive = row < ROWS
    gain, draft = _merged(words, peaks, totals, request * ROWS, alive, row, SPLITS, WIDTH, BLOCK_SPLITS, BLOCK_WORDS,
                          BLOCK_WIDTH)  # fmt: skip
    there = alive[:, None] & (place < WIDTH)[None, :]
    index = row[:, None] * WIDTH + place[None, :]
    path, above = gain, tl.full([BLOCK_ROWS], -1, tl.int64)
    if old_at is not None:
        path = gain + tl.load(old_scores + request * ROWS + row, mask=alive, other=0.0)[:, None]
        above = tl.load(old_at + request * ROWS + row, mask=alive, other=0)
    token = tl.load(ids + draft, mask=there, other=0)
    at = request * capacity + count + index
    tl.store(tokens + at, token, mask=there)
    tl.store(scores + at, path, mask=there)
    tl.store(parents + at, tl.broadcast_to(above[:, None], [BLOCK_ROWS, BLOCK_WIDTH]), mask=there)
    paths = tl.where(there, _words(path, index), NOTHING)
    best = _best(tl.reshape(paths, [1, BLOCK_ROWS * BLOCK_WIDTH]), WIDTH, BLOCK_WIDTH)
    best = tl.reshape(best, [BLOCK_WIDTH])
    out, wide = request * WIDTH + place, place < WIDTH
    grown = tl.where(wide, _index(best), 0)
    parent = grown // WIDTH
    bits = tl.full([BLOCK_WIDTH], 1, tl.int64) << (before + place)
    if old_bits is not None:
        bits |= tl.load(old_bits + request * ROWS + parent, mask=wide, other=0)
    flat = tl.reshape(token, [BLOCK_ROWS * BLOCK_WIDTH])
    tl.store(new_tokens + out, tl.gather(flat, parent * BLOCK_WIDTH + grown % WIDTH, 0), mask=wide)
    tl.store(new_scores + out, _score(best), mask=wide)
    tl.store(new_at + out, (count + grown).to(tl.int64), mask=wide)
    tl.store(new_bits + out, bits, mask=wide)
    _follow(y, new_y, request, parent, hidden, ROWS, WIDTH, BLOCK_WIDTH, BLOCK_HIDDEN)


@triton.jit
def _threshold(ordered, there, keep):
    """The `keep`-th largest of the ordered scores that are there, found bit by bit from the highest."""
    some = tl.sum((there & (ordered >= 0)).to(tl.int32), 0) >= keep
    least = tl.where(some, 0, LEAST).to(tl.int32)
    for turn in range(31):
        higher = least | (1 << (30 - turn))
        least = tl.where(tl.sum((there & (ordered >= higher)).to(tl.int32), 0) >= keep, higher, least)
    return least


@triton.jit
def _lineage(above, node, TURNS: tl.constexpr):
    """(depths, ancestor words) int64 of nodes by pointer doubling; `above` int32 is a node's parent."""
    ancestors = tl.full(above.shape, 1, tl.int64) << node
    depths = tl.where(node > 0, 1, 0).to(tl.int64)
    for _ in range(TURNS):
        ancestors |= tl.gather(ancestors, above, 0)
        depths += tl.gather(depths, above, 0)
        above = tl.gather(above, above, 0)
    return depths, ancestors


@triton.jit(do_not_specialize=["count"])
def rerank_kernel(
    roots, tokens, parents, scores, out_tokens, out_parents, out_scores, depths, ancestors, sizes, count, capacity,
    NODES: tl.constexpr, TURNS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_NODES: tl.constexpr,
):  # fmt: skip
    """The tree of one request's NODES - 1 best candidates. Grid (requests,).

    roots int64 [B]; candidates tokens, parents int64 and scores float32 [B, capacity], `count` >= NODES - 1 of them in
    use; out_tokens, out_parents, depths, ancestors int64 and out_scores float32 [B, NODES]; sizes int64 [B].
    """
    wait_for_others()
    request, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    there, given, out = c < count, request * capacity + c, request * NODES
    score = tl.load(scores + given, mask=there, other=float("-inf"))
    ordered, keep = _ordered(score), NODES - 1
    least = _threshold(ordered, there, keep)
    more, equal = there & (ordered > least), there & (ordered == least)
    room = keep - tl.sum(more.to(tl.int32), 0)
    kept = more | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
    place = tl.cumsum(kept.to(tl.int32), 0)
    parent = tl.load(parents + given, mask=there, other=-1).to(tl.int32)
    above = tl.where(parent < 0, 0, tl.gather(place, tl.maximum(parent, 0), 0))
    tl.store(out_tokens + out + place, tl.load(tokens + given, mask=kept, other=0), mask=kept)
    tl.store(out_parents + out + place, above.to(tl.int64), mask=kept)
    tl.store(out_scores + out + place, score, mask=kept)
    tl.store(out_tokens + out, tl.load(roots + request))
    tl.store(out_parents + out, 0)
    tl.store(out_scores + out, 0.0)
    tl.store(sizes + request, NODES)
    tl.debug_barrier()  # the parents are read back in the order of the tree's nodes
    node = tl.arange(0, BLOCK_NODES)
    used = node < NODES
    above = tl.load(out_parents + out + node, mask=used, other=0).to(tl.int32)
    depth, word = _lineage(above, node, TURNS)
    tl.store(depths + out + node, depth, mask=used)
    tl.store(ancestors + out + node, word, mask=used)
