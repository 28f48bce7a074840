"""The Triton kernels of tree attention: split keys, pack the query heads of a group, combine the splits.

Imported only by functions that are about to launch or compile them, because it imports triton. Knows nothing
of torch tensors, tilings or the cache: `specdec.attention.triton` chooses those.

    rows     r = node * GROUP + head of group: a key is read once for all query heads that share it
    keys     [0 ... blocks wholly in the prefix: no mask ...)[ tail: last prefix keys and tree rows, by bit )
    splits   equal shares of the keys, cut at the length in device memory: one graph fits all lengths

All exponentials are base 2: scores arrive multiplied by log2(e), and the stored log-sum-exp is a log2.
"""
# mypy: ignore-errors
# (the bodies are Triton's own language, and triton carries no types)

from __future__ import annotations

import triton
import triton.language as tl

from specdec.fused.overlap_kernels import wait_for_others


@triton.jit
def _fold(q, k, v, sees, acc, peak, total, scale, softcap, MASKED: tl.constexpr):
    """Fold one block of keys into the running softmax of each row."""
    score = tl.dot(q, k, input_precision="ieee") * scale
    if softcap is not None:  # tanh(x) = 1 - 2 / (e^2x + 1); `scale` already holds 2 log2(e) / softcap
        score = softcap * (1.0 - 2.0 / (tl.exp2(score) + 1.0))
    if MASKED:
        score = tl.where(sees, score, float("-inf"))
    higher = tl.maximum(peak, tl.max(score, 1))
    pivot = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
    weight = tl.exp2(score - pivot[:, None])
    shrink = tl.exp2(peak - pivot)
    total = total * shrink + tl.sum(weight, 1)
    acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, higher, total


@triton.jit
def _sees_tree(key, end, length, request, node, alive, nodes, offset, ancestors, word, WORDS: tl.constexpr):
    """bool [rows, keys]: committed keys always, tree rows by ancestor bit, or causally without ancestors."""
    tree = key - length
    if ancestors is None:
        sees = tree[None, :] <= (offset + node)[:, None]
    else:
        bit = tl.maximum(tree, 0)
        if WORDS > 1:
            at = (request * nodes + node)[:, None] * WORDS + (bit >> 6)[None, :]
            there = (tree >= 0) & (key < end)
            word = tl.load(ancestors + at, mask=alive[:, None] & there[None, :], other=0)
        sees = (tree < 0)[None, :] | (((word >> (bit & 63)[None, :]) & 1) == 1)
    return sees & (key < end)[None, :]


@triton.jit
def _key_position(key, end, length, request, nodes, offset, ancestors, tree_positions):
    """RoPE position of a tail key: its index, but for tree rows their node's position."""
    if ancestors is None:
        return key
    tree = key - length
    at = tree_positions + request * (offset + nodes) + tree
    return tl.where(tree < 0, key, tl.load(at, mask=(tree >= 0) & (key < end), other=0).to(tl.int32))


@triton.jit
def _span(length, node_end, position, offset, window, split, SPLITS: tl.constexpr, LEAST: tl.constexpr,
          BLOCK_KEYS: tl.constexpr):  # fmt: skip
    """(start, stop, end): the keys of this split in whole blocks, and the end of all keys of this tile."""
    first = 0
    if window is not None:
        first = tl.maximum(tl.min(position, 0) - window + 1, 0) // BLOCK_KEYS * BLOCK_KEYS
    end = length + offset + node_end
    share = tl.cdiv(tl.cdiv(end - first, SPLITS), BLOCK_KEYS) * BLOCK_KEYS
    share = tl.maximum(share, LEAST)
    start = first + split * share
    return start, tl.minimum(start + share, end), end


@triton.jit
def _store(acc, peak, total, out, partial, lse, spot, alive, dim, split, HEAD: tl.constexpr,
           SPLITS: tl.constexpr):  # fmt: skip
    """Write finished rows, or this split's part of them; a split without keys leaves only its -inf."""
    safe = tl.where(total == 0.0, 1.0, total)
    scaled = acc / safe[:, None]
    wide = (dim < HEAD)[None, :]
    if SPLITS == 1:
        mask = alive[:, None] & wide
        tl.store(out + spot[:, None] * HEAD + dim[None, :], scaled.to(out.dtype.element_ty), mask=mask)
    else:
        at = spot * SPLITS + split
        some = (alive & (total > 0.0))[:, None]
        tl.store(lse + at, tl.where(total > 0.0, peak + tl.log2(safe), float("-inf")), mask=alive)
        tl.store(partial + at[:, None] * HEAD + dim[None, :], scaled, mask=some & wide)


@triton.jit
def _sight(request, node, alive, nodes, ancestors, positions, window, WORDS: tl.constexpr):
    """(word, position) of each row, loaded once; what is not used compiles to nothing."""
    at = request * nodes + node
    word, position = node[:, None].to(tl.int64), node
    if ancestors is not None and WORDS == 1:
        word = tl.load(ancestors + at, mask=alive, other=0)[:, None]
    if window is not None:  # dead rows must not widen the window of their tile
        position = tl.load(positions + at, mask=alive, other=1 << 30).to(tl.int32)
    return word, position


@triton.jit
def split_kernel(
    q, k, v, slots, lengths, ancestors, positions, tree_positions, out, partial, lse,
    nodes, offset, scale, softcap, window, q_request, q_node, q_head, kv_slot, kv_head, kv_row,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, WORDS: tl.constexpr,
    SPLITS: tl.constexpr, LEAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_HEAD: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one request and KV head against one share of its keys.

    Grid (row tiles, requests * kv heads, splits). q [B, N, Hq, D] and k, v [slots, Hkv, S, D] by strides, the
    same for k and v; out [B, N, Hq, D], partial float32 [B, N, Hq, SPLITS, D], lse float32 [B, N, Hq, SPLITS]
    contiguous. `ancestors`, `softcap` and `window` (with both positions) may be None, which drops their code.
    """
    wait_for_others()
    request, kv, split = tl.program_id(1) // KV_HEADS, tl.program_id(1) % KV_HEADS, tl.program_id(2)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    node, head = row // GROUP, kv * GROUP + row % GROUP
    dim, column = tl.arange(0, BLOCK_HEAD), tl.arange(0, BLOCK_KEYS)
    alive, wide, tall = node < nodes, (dim < HEAD)[None, :], (dim < HEAD)[:, None]
    q_at = node[:, None] * q_node + head[:, None] * q_head + dim[None, :]
    query = tl.load(q + request.to(tl.int64) * q_request + q_at, mask=alive[:, None] & wide, other=0.0)
    word, position = _sight(request, node, alive, nodes, ancestors, positions, window, WORDS)
    length = tl.load(lengths + request).to(tl.int32)
    plane = tl.load(slots + request).to(tl.int64) * kv_slot + kv.to(tl.int64) * kv_head
    k, v = k + plane, v + plane
    node_end = nodes
    if ancestors is None:
        node_end = tl.minimum(nodes, (tl.program_id(0) * BLOCK_ROWS + BLOCK_ROWS - 1) // GROUP + 1)
    start, stop, end = _span(length, node_end, position, offset, window, split, SPLITS, LEAST, BLOCK_KEYS)
    inner = tl.minimum(stop, length // BLOCK_KEYS * BLOCK_KEYS)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_HEAD], tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    peak = total - float("inf")
    for block in range(start, inner, BLOCK_KEYS):
        key = block + column
        keys = tl.load(k + key[None, :] * kv_row + dim[:, None], mask=tall, other=0.0)
        values = tl.load(v + key[:, None] * kv_row + dim[None, :], mask=wide, other=0.0)
        if window is None:
            acc, peak, total = _fold(query, keys, values, None, acc, peak, total, scale, softcap, False)
        else:
            near = position[:, None] - key[None, :] < window
            acc, peak, total = _fold(query, keys, values, near, acc, peak, total, scale, softcap, True)
    for block in range(tl.maximum(start, inner), stop, BLOCK_KEYS):
        key = block + column
        there = key < end
        keys = tl.load(k + key[None, :] * kv_row + dim[:, None], mask=tall & there[None, :], other=0.0)
        values = tl.load(v + key[:, None] * kv_row + dim[None, :], mask=wide & there[:, None], other=0.0)
        sees = _sees_tree(key, end, length, request, node, alive, nodes, offset, ancestors, word, WORDS)
        if window is not None:
            of_key = _key_position(key, end, length, request, nodes, offset, ancestors, tree_positions)
            sees = sees & (position[:, None] - of_key[None, :] < window)
        acc, peak, total = _fold(query, keys, values, sees, acc, peak, total, scale, softcap, True)
    spot = (request.to(tl.int64) * nodes + node) * (KV_HEADS * GROUP) + head
    _store(acc, peak, total, out, partial, lse, spot, alive, dim, split, HEAD, SPLITS)


@triton.jit
def combine_kernel(out, partial, lse, HEAD: tl.constexpr, SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
                   BLOCK_HEAD: tl.constexpr):  # fmt: skip
    """Weigh the splits of one row of one head by their log-sum-exp. Grid (B * N * Hq,)."""
    wait_for_others()
    row = tl.program_id(0).to(tl.int64)
    split, dim = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_HEAD)
    level = tl.load(lse + row * SPLITS + split, mask=split < SPLITS, other=float("-inf"))
    some = level > float("-inf")
    weight = tl.exp2(level - tl.max(tl.where(some, level, -3.0e38), 0))
    at = (row * SPLITS + split)[:, None] * HEAD + dim[None, :]
    part = tl.load(partial + at, mask=some[:, None] & (dim < HEAD)[None, :], other=0.0)
    total = tl.sum(weight, 0)
    mixed = tl.sum(weight[:, None] * part, 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * HEAD + dim, mixed.to(out.dtype.element_ty), mask=dim < HEAD)
