"""Tree attention with dense torch operations: any device, any dtype; the default on the CPU and the oracle.

Query heads of a group are packed into rows (head-major), so keys and values are read once and never repeated.
On the CPU each request attends over exactly its own rows; many requests of similar length go together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from specdec.attention.protocol import Rows
from specdec.cache import KVCache

TOGETHER_WASTE = 1.6  # batch requests in one call while padding costs at most this factor


@dataclass(frozen=True, slots=True)
class _Part:
    """Requests that go through one product: batch rows, their cache slots, rows read, who sees whom."""

    requests: slice
    slots: slice | Tensor
    total: int
    mask: Tensor | None  # bool [b, 1, N, total]; None when every row sees all


class ReferenceAttention:
    """Dense attention over `[slots, kv_heads, length, head_dim]` views of the cache."""

    name = "reference"

    def plan(self, rows: Rows, cache: KVCache, window: int | None) -> list[_Part]:
        """Split the batch into products and build their masks."""
        b, n = rows.positions.shape
        if rows.index.spans is None:
            whole = self._mask(rows, slice(0, b), cache.length, window)
            return [_Part(slice(0, b), rows.slots, cache.length, whole)]
        totals = [start + n for _, start in rows.index.spans]
        slots = [slot for slot, _ in rows.index.spans]
        neat = slots == list(range(slots[0], slots[0] + b))
        if b > 1 and neat and b * max(totals) <= TOGETHER_WASTE * sum(totals):
            mask = self._mask(rows, slice(0, b), max(totals), window)
            return [_Part(slice(0, b), slice(slots[0], slots[0] + b), max(totals), mask)]
        parts = []
        for row, (slot, total) in enumerate(zip(slots, totals, strict=True)):
            alone = n == 1 and rows.offset == 0 and (window is None or total <= window)
            mask = None if alone else self._mask(rows, slice(row, row + 1), total, window)
            parts.append(_Part(slice(row, row + 1), slice(slot, slot + 1), total, mask))
        return parts

    def _mask(self, rows: Rows, pick: slice, total: int, window: int | None) -> Tensor:
        """bool [b, 1, N, total]: the prefix, then tree rows by ancestor bit or causally; windows by position."""
        lengths, positions = rows.lengths[pick, None, None], rows.positions[pick, :, None]
        column = torch.arange(total, device=lengths.device)
        row = column - lengths  # [b, 1, total], index among the tree rows
        if rows.ancestors is None:
            sees = row <= torch.arange(positions.shape[1], device=column.device)[:, None]
        else:
            bits = (rows.ancestors[pick, :, None] >> row.clamp(0, 63)) & 1
            sees = (row < 0) | ((bits == 1) & (row < 64))
        if window is not None:
            sees = sees & (positions - self._key_positions(rows, pick, column) < window)
        return sees[:, None]

    def _key_positions(self, rows: Rows, pick: slice, column: Tensor) -> Tensor:
        """Positions of the cache rows [b, 1, total]: their index, but for tree rows their node's position."""
        lengths = rows.lengths[pick, None]
        if rows.ancestors is None:
            return column[None, None]
        assert rows.tree_positions is not None or rows.offset == 0, "a window needs all tree positions"
        tree = rows.positions if rows.tree_positions is None else rows.tree_positions
        row = column - lengths
        at = tree[pick].gather(1, row.clamp(0, tree.shape[1] - 1))
        return torch.where(row < 0, column, at)[:, None]

    def attend(self, query: Tensor, cache: KVCache, layer: int, plan: list[_Part], scale: float,
               softcap: float | None = None) -> Tensor:  # fmt: skip
        """query [B, N, H, D] -> [B, N, H, D]."""
        keys, values = cache.kv[layer, 0], cache.kv[layer, 1]
        outs = [
            _product(query[p.requests], keys[p.slots, :, : p.total], values[p.slots, :, : p.total], p.mask, scale,
                     softcap)
            for p in plan
        ]  # fmt: skip
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def _product(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float,
             softcap: float | None) -> Tensor:  # fmt: skip
    b, n, heads, d = query.shape
    groups = heads // keys.shape[1]
    packed = query.view(b, n, keys.shape[1], groups, d).permute(0, 2, 3, 1, 4).reshape(b, keys.shape[1], groups * n, d)
    if mask is not None and groups > 1:
        mask = mask.repeat(1, 1, groups, 1)
    if softcap is None:
        out = F.scaled_dot_product_attention(packed, keys, values, attn_mask=mask, scale=scale)
    else:
        score = softcap * torch.tanh(packed.float() @ keys.float().transpose(-1, -2) * (scale / softcap))
        score = score if mask is None else score.masked_fill(~mask, -torch.inf)
        out = (score.softmax(-1) @ values.float()).to(query.dtype)
    return out.view(b, keys.shape[1], groups, n, d).permute(0, 3, 1, 2, 4).reshape(b, n, heads, d)
