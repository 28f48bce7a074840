"""The Triton kernel that follows the target's tokens down a tree.

Imported only by functions that are about to launch or compile it, because it imports triton.
"""
# mypy: ignore-errors
# (the body is Triton's own language, and triton carries no types)

from __future__ import annotations

import triton
import triton.language as tl

from specdec.fused.overlap_kernels import wait_for_others


@triton.jit
def walk_kernel(
    tokens, parents, depths, ancestors, sizes, chosen, kept, counts, emitted, offered,
    NODES: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The verdict on one request's tree. Grid (requests,).

    tokens, parents, depths, ancestors, chosen int64 [B, NODES], sizes int64 [B]; kept and emitted int64 [B, WIDTH],
    counts and offered int64 [B]. See `specdec.accept.walk`, of which this is a copy line by line.
    """
    wait_for_others()
    request, node = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    used, at = node < NODES, request * NODES + node
    size = tl.load(sizes + request)
    parent = tl.load(parents + at, mask=used, other=0)
    depth = tl.load(depths + at, mask=used, other=0)
    word = tl.load(ancestors + at, mask=used, other=0)
    own = tl.load(chosen + at, mask=used, other=-1)
    wanted = tl.load(chosen + request * NODES + parent, mask=used, other=-1)
    agrees = (wanted == tl.load(tokens + at, mask=used, other=-2)) & (node < size) | (node == 0)
    blocked = tl.sum(tl.where(used & (agrees == 0), tl.full([BLOCK], 1, tl.int64) << node, 0), 0)
    stands = used & ((word & blocked) == 0)
    # the deepest that stands, the first among equals
    farthest = tl.max(tl.where(stands, depth * BLOCK + (BLOCK - 1 - node), -1), 0)
    last, count = BLOCK - 1 - farthest % BLOCK, farthest // BLOCK + 1
    path = tl.sum(tl.where(node == last, word, 0), 0)
    on = used & (((path >> node) & 1) == 1) & (depth < WIDTH)  # a node's depth is its place on its path
    tl.store(kept + request * WIDTH + depth, node.to(tl.int64), mask=on)
    tl.store(emitted + request * WIDTH + depth, own, mask=on)
    beyond = (node < WIDTH) & (node >= count)
    tl.store(kept + request * WIDTH + node, tl.broadcast_to(last, [BLOCK]), mask=beyond)
    tl.store(emitted + request * WIDTH + node, tl.full([BLOCK], -1, tl.int64), mask=beyond)
    tl.store(counts + request, count)
    tl.store(offered + request, tl.max(tl.where(used & (node < size), depth, 0), 0))
