"""The Triton kernels of accepted (feature, token) pairs: kept by one round, read by the next.

Imported only by functions that are about to launch or compile them, because it imports triton. Shapes of all: the
pairs of a slot, features [slots, room, width] and tokens int64 [slots, room]; waiting int64 by slot, how many of them
there are; slots int64 [requests]. Neighbours of one slot are one request given twice.
"""
# mypy: ignore-errors
# (the bodies are Triton's own language, and triton carries no types)

from __future__ import annotations

import triton
import triton.language as tl

from specdec.fused.overlap_kernels import wait_for_others
from specdec.fused.settle_kernels import first_of_slot


@triton.jit
def keep_kernel(
    features, kept, emitted, slots, waiting, to_features, to_tokens, nodes, width, room,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One accepted node's features and the token that followed it join the pairs of its slot.

    Grid (requests, WIDTH, blocks of features). features [B, nodes, width]; kept, emitted int64 [B, WIDTH].
    """
    wait_for_others()
    request, place = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dim = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    at = request * WIDTH + place
    slot, node = tl.load(slots + request), tl.load(kept + at)
    to = slot * room + tl.load(waiting + slot) + place
    value = tl.load(features + (request * nodes + node) * width + dim, mask=dim < width, other=0.0)
    tl.store(to_features + to * width + dim, value, mask=dim < width)
    if tl.program_id(2) == 0:
        tl.store(to_tokens + to, tl.maximum(tl.load(emitted + at), 0))


@triton.jit
def take_kernel(
    features, tokens, slots, waiting, lengths, to_features, to_tokens, first, indices, width, room,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pair of a request, side by side with the others, and the head row it is for.

    Grid (requests, WIDTH, blocks of features). lengths int64 [B], committed; to_features [B, WIDTH, width] of any
    dtype, to_tokens int64 [B, WIDTH]; first int64 [B], the row of the first pair, and indices int64 [B, WIDTH].
    """
    wait_for_others()
    request, place = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dim = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    slot, at = tl.load(slots + request), request * WIDTH + place
    value = tl.load(features + (slot * room + place) * width + dim, mask=dim < width, other=0.0)
    tl.store(to_features + at * width + dim, value.to(to_features.dtype.element_ty), mask=dim < width)
    if tl.program_id(2) == 0:
        row = tl.load(lengths + request) - tl.load(waiting + slot)
        tl.store(first + request, row, mask=place == 0)
        tl.store(indices + at, row + place)
        tl.store(to_tokens + at, tl.load(tokens + slot * room + place))


@triton.jit
def leave_kernel(y, slots, waiting, last, now, hidden, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The head's output at a request's last pair, or what it was before where no pair waited.

    Grid (requests, blocks). y [B, WIDTH, hidden]; last [slots, hidden], read and written; now [B, hidden].
    """
    wait_for_others()
    request = tl.program_id(0).to(tl.int64)
    dim = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + request)
    count, inside = tl.load(waiting + slot), dim < hidden
    fresh = tl.load(y + (request * WIDTH + tl.maximum(count - 1, 0)) * hidden + dim, mask=inside, other=0.0)
    value = tl.where(count > 0, fresh, tl.load(last + slot * hidden + dim, mask=inside, other=0.0))
    tl.store(now + request * hidden + dim, value, mask=inside)
    tl.store(last + slot * hidden + dim, value, mask=dim < tl.where(first_of_slot(slots, request), hidden, 0))
