"""The Triton kernel of tree attention: split keys, pack the query heads of a group, merge the splits.

Imported only by functions that are about to launch or compile them, because it imports triton. Knows nothing
of torch tensors, tilings or the cache: `specdec.attention.triton` chooses those.

    rows     r = node * GROUP + head of group: a key is read once for all query heads that share it
    keys     [0 ... blocks wholly in the prefix: no mask ...)[ tail: last prefix keys and tree rows, by bit )
    splits   equal shares of the keys, cut at the length in device memory: one graph fits all lengths
    merge    by whoever of a tile's splits is done last: a second launch would take longer than its work

All exponentials are base 2: scores arrive multiplied by log2(e), and the stored log-sum-exp is a log2.
"""
# mypy: ignore-errors
# (the bodies are Triton's own language, and triton carries no types)

from __future__ import annotations

import triton
import triton.language as tl

from specdec.fused.overlap_kernels import wait_for_others
from specdec.fused.turns_kernels import is_last


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
def _span(length, node_end, position, offset, window, split, splits, worth, LEAST: tl.constexpr,
          BLOCK_KEYS: tl.constexpr):  # fmt: skip
    """(start, stop, end, parts): the keys of this split in whole blocks, the end of all keys of this tile, and how
    many of its splits have keys, or would if there were any.

    Of n keys, shares of sqrt(n * worth) take the least time to read one and then merge all, where merging a split
    takes as long as reading `worth` keys.
    """
    first = 0
    if window is not None:
        first = tl.maximum(tl.min(position, 0) - window + 1, 0) // BLOCK_KEYS * BLOCK_KEYS
    end = length + offset + node_end
    keys = tl.maximum(end - first, 0).to(tl.float32)
    share = tl.maximum(tl.cdiv(end - first, splits), tl.sqrt(keys * worth).to(tl.int32))
    share = tl.maximum(tl.cdiv(share, BLOCK_KEYS) * BLOCK_KEYS, LEAST)
    start = first + split * share
    return start, tl.minimum(start + share, end), end, tl.maximum(tl.cdiv(end - first, share), 1)


@triton.jit
def _put(acc, total, out, row, rows, dim, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr):
    """Divide packed rows by their weights, round and store them; rows that saw nothing are zero."""
    made = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    at = row // GROUP * (KV_HEADS * GROUP) + row % GROUP
    mask = (row < rows)[:, None] & (dim < HEAD)[None, :]
    tl.store(out + (at[:, None] * HEAD + dim[None, :]), made.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _leave(
    acc, peak, total, partial, lse, alive, dim, split, BLOCK_ROWS: tl.constexpr, BLOCK_HEAD: tl.constexpr
):
    """Write this split's part of its tile. Of rows that saw none of its keys it is zeros, with -inf."""
    safe = tl.where(total == 0.0, 1.0, total)
    at = split * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tl.store(lse + at, tl.where(total > 0.0, peak + tl.log2(safe), float("-inf")), mask=alive)
    tl.store(partial + at[:, None] * BLOCK_HEAD + dim[None, :], acc / safe[:, None], mask=alive[:, None])


@triton.jit
def _merged(partial, lse, row, alive, dim, parts, BLOCK_ROWS: tl.constexpr, BLOCK_HEAD: tl.constexpr,
            MERGED_ROWS: tl.constexpr, MERGED_PARTS: tl.constexpr):  # fmt: skip
    """(acc, total) of a few rows of a tile: their parts weighed by log-sum-exp, always in one order.

    No load waits for another. A thread holds all parts of its elements, so that it sums them up alone.
    """
    part = tl.arange(0, MERGED_PARTS)
    acc = tl.zeros([MERGED_ROWS, BLOCK_HEAD], tl.float32)
    total = tl.zeros([MERGED_ROWS], tl.float32)
    peak = total - float("inf")
    for start in range(0, parts, MERGED_PARTS):
        there = (part < parts - start)[:, None] & alive[None, :]
        # what differs between parts is added last: it is constant, and takes no registers
        spot = partial + start * (BLOCK_ROWS * BLOCK_HEAD) + (row[:, None] * BLOCK_HEAD + dim[None, :])
        spot = spot[None, :, :] + (part * (BLOCK_ROWS * BLOCK_HEAD))[:, None, None]
        # rows follow each other no more than parts do; but threads have to share rows, and not every triton says so
        spot = tl.max_contiguous(spot, [1, 2, BLOCK_HEAD])
        value = tl.load(spot, mask=there[:, :, None], other=0.0, cache_modifier=".cg")
        at = lse + start * BLOCK_ROWS + row[None, :] + (part * BLOCK_ROWS)[:, None]
        level = tl.load(at, mask=there, other=float("-inf"), cache_modifier=".cg")
        higher = tl.maximum(peak, tl.max(level, 0))
        pivot = tl.where(higher == float("-inf"), 0.0, higher)
        weight, shrink = tl.exp2(level - pivot[None, :]), tl.exp2(peak - pivot)
        acc = acc * shrink[:, None] + tl.sum(weight[:, :, None] * value, 0)
        total = total * shrink + tl.sum(weight, 0)
        peak = higher
    return acc, total


@triton.jit
def _finish(
    acc, peak, total, out, partial, lse, turns, request, kv, dim, nodes, split, splits, parts,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr,
    MERGED_ROWS: tl.constexpr, MERGED_PARTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_HEAD: tl.constexpr,
):  # fmt: skip
    """Store finished rows: at once where one split has all keys, else by the last of those that have some.

    A few rows are merged at a time: all in one kernel's registers would spill.
    """
    first, rows = tl.program_id(0) * BLOCK_ROWS, nodes * GROUP
    row = first + tl.arange(0, BLOCK_ROWS)
    out += request.to(tl.int64) * nodes * (KV_HEADS * GROUP * HEAD) + kv * (GROUP * HEAD)
    if turns is None:
        _put(acc, total, out, row, rows, dim, KV_HEADS, GROUP, HEAD)
    elif split < parts:
        if parts == 1:
            _put(acc, total, out, row, rows, dim, KV_HEADS, GROUP, HEAD)
        else:
            tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
            lse += tile * (splits * BLOCK_ROWS)
            partial += tile.to(tl.int64) * (splits * BLOCK_ROWS * BLOCK_HEAD)
            _leave(acc, peak, total, partial, lse, row < rows, dim, split, BLOCK_ROWS, BLOCK_HEAD)
            if is_last(turns + tile, parts):
                for start in range(0, tl.minimum(BLOCK_ROWS, rows - first), MERGED_ROWS):
                    few = start + tl.arange(0, MERGED_ROWS)
                    mixed, weights = _merged(partial, lse, few, first + few < rows, dim, parts, BLOCK_ROWS,
                                             BLOCK_HEAD, MERGED_ROWS, MERGED_PARTS)  # fmt: skip
                    _put(mixed, weights, out, first + few, rows, dim, KV_HEADS, GROUP, HEAD)


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


@triton.jit(do_not_specialize=["splits", "worth"])
def split_kernel(
    q, k, v, slots, lengths, ancestors, positions, tree_positions, out, partial, lse, turns,
    nodes, offset, scale, softcap, window, q_request, q_node, q_head, kv_slot, kv_head, kv_row, splits, worth,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, WORDS: tl.constexpr,
    LEAST: tl.constexpr, MERGED_ROWS: tl.constexpr, MERGED_PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_HEAD: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one request and KV head against one share of its keys; the last to finish merges.

    Grid (row tiles, requests * kv heads, splits). q [B, N, Hq, D] and k, v [slots, Hkv, S, D] by strides, the
    same for k and v; out [B, N, Hq, D] dense. Of each tile, partial float32 [splits, BLOCK_ROWS, BLOCK_HEAD], lse
    float32 [splits, BLOCK_ROWS] and turns int32, which is zero before and after; with one split they may be None, and
    `ancestors`, `softcap` and `window` (with both positions) wherever they are not wanted: that drops their code.
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
    start, stop, end, parts = _span(length, node_end, position, offset, window, split, splits, worth, LEAST,
                                    BLOCK_KEYS)  # fmt: skip
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
    _finish(acc, peak, total, out, partial, lse, turns, request, kv, dim, nodes, split, splits, parts, KV_HEADS,
            GROUP, HEAD, MERGED_ROWS, MERGED_PARTS, BLOCK_ROWS, BLOCK_HEAD)  # fmt: skip
