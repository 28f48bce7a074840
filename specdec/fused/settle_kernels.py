"""The Triton kernels that end a round: accepted rows move together, standings go on.

Imported only by functions that are about to launch or compile them, because it imports triton. Neighbours of one slot
are one request given twice: only the first of them changes what belongs to the slot.
"""
# mypy: ignore-errors
# (the bodies are Triton's own language, and triton carries no types)

from __future__ import annotations

import triton
import triton.language as tl

from specdec.fused.overlap_kernels import wait_for_others


@triton.jit
def first_of_slot(slots, request):
    """Is this the first of the requests of its slot?"""
    before = tl.load(slots + tl.maximum(request - 1, 0), mask=request > 0, other=-1)
    return before != tl.load(slots + request)


@triton.jit
def compact_kernel(
    kv, slots, lengths, kept, slot_stride, plane_stride, head_stride, row_stride, heads,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_HEAD: tl.constexpr,
):  # fmt: skip
    """Rows `length + kept[j]` of one request, plane (a layer's keys or values) and head move to `length + j`.

    Grid (requests, planes * heads). All rows are read before any is written; no other program touches them.
    """
    wait_for_others()
    request = tl.program_id(0).to(tl.int64)
    plane, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    place, dim = tl.arange(0, BLOCK_WIDTH), tl.arange(0, BLOCK_HEAD)
    inside = place < tl.where(first_of_slot(slots, request), WIDTH, 0)
    slot, length = tl.load(slots + request), tl.load(lengths + request)
    node = tl.load(kept + request * WIDTH + place, mask=inside, other=0)
    base = kv + plane * plane_stride + slot * slot_stride + head * head_stride + dim[None, :]
    mask = inside[:, None] & (dim < HEAD)[None, :]
    rows = tl.load(base + ((length + node) * row_stride)[:, None], mask=mask, other=0.0)
    tl.debug_barrier()
    tl.store(base + ((length + place) * row_stride)[:, None], rows, mask=mask)


@triton.jit
def settle_kernel(
    kept, counts, emitted, offered, sizes, scores, peaks, slots, roots, lengths, waiting, report, promised,
    nodes, report_stride, WIDTH: tl.constexpr, FIRST: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    BLOCK_NODES: tl.constexpr,
):  # fmt: skip
    """The standing of one request after its round, and its line of the report. Grid (requests,).

    kept, emitted int64 [B, WIDTH]; counts, offered, sizes int64 [B]; scores float32 [B, nodes] or None; peaks
    [B, nodes], the largest logit after each node, NaN where one is; roots, lengths, waiting int64 by slot (waiting may
    be None); report int64 by its stride: count, offered, size, sick, then from FIRST on the tokens; promised float32.
    """
    wait_for_others()
    request, place = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_WIDTH)
    inside, at = place < WIDTH, request * WIDTH + place
    slot, count, size = tl.load(slots + request), tl.load(counts + request), tl.load(sizes + request)
    token = tl.load(emitted + at, mask=inside, other=-1)
    peak = tl.load(peaks + request * nodes + tl.load(kept + at, mask=inside, other=0), mask=inside, other=0.0)
    sick = tl.max(tl.where(peak != peak, 1, 0), 0).to(tl.int64)
    line = report + request * report_stride
    tl.store(line, count)
    tl.store(line + 1, tl.load(offered + request))
    tl.store(line + 2, size)
    tl.store(line + 3, sick)
    tl.store(line + FIRST + place, token, mask=inside)
    hope = 0.0
    if scores is not None:
        node = tl.arange(0, BLOCK_NODES)
        drafted = (node > 0) & (node < size) & (node < nodes)
        score = tl.load(scores + request * nodes + node, mask=drafted, other=float("-inf"))
        hope = tl.sum(tl.exp(score), 0)
    tl.store(promised + request, hope)
    first = first_of_slot(slots, request)
    tl.store(roots + slot, tl.sum(tl.where(place == count - 1, token, 0), 0), mask=first)
    tl.store(lengths + slot, tl.load(lengths + slot) + count, mask=first)
    if waiting is not None:
        tl.store(waiting + slot, tl.load(waiting + slot) + count, mask=first)
