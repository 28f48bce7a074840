"""Tree attention with dense torch operations: any device, any dtype; the default on the CPU and the oracle.

Query heads of a group are packed into rows (head-major), so keys and values are read once and never repeated.
On the CPU each request attends over exactly its own rows; many requests of similar length go together.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from specdec.attention.protocol import Rows
from specdec.cache import KVCache

TOGETHER_WASTE = 1.6  # requests share a product while padding costs at most this factor
VIEW_WASTE = 2.2  # more when their slots are a run, so that nothing has to be gathered


@dataclass(frozen=True, slots=True)
class _Part:
    """Requests that go through one product: batch rows, their cache slots, rows read, who sees whom."""

    requests: slice | Tensor
    slots: slice | Tensor
    total: int
    mask: Tensor | None  # bool [b, 1, N, total]; None when every row sees all
    biases: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)

    def bias(self, groups: int, dtype: torch.dtype) -> Tensor | None:
        """The mask as what is added to scores, [b, 1, groups * N, total]: 0 or -inf; made once for all layers."""
        if self.mask is None:
            return None
        if (groups, dtype) not in self.biases:
            hidden = torch.zeros(self.mask.shape, dtype=dtype, device=self.mask.device)
            hidden.masked_fill_(~self.mask, -torch.inf)
            self.biases[groups, dtype] = hidden.repeat(1, 1, groups, 1)
        return self.biases[groups, dtype]


class ReferenceAttention:
    """Dense attention over `[slots, kv_heads, length, head_dim]` views of the cache."""

    name = "reference"

    def plan(self, rows: Rows, cache: KVCache, window: int | None) -> list[_Part]:
        """Split the batch into products of requests of similar length and build their masks."""
        b, n = rows.positions.shape
        if rows.index.spans is None:
            every = torch.arange(b, device=rows.slots.device)
            return [
                _Part(slice(None), rows.slots, cache.length, self._mask(rows, every, cache.length, window))
            ]
        totals = [start + n for _, start in rows.index.spans]
        slots = [slot for slot, _ in rows.index.spans]
        parts = []
        for group in _groups(totals, slots):
            total = max(totals[i] for i in group)
            alone = len(group) == 1 and n == 1 and rows.offset == 0 and (window is None or total <= window)
            mask = None if alone else self._mask(rows, torch.tensor(group), total, window)
            parts.append(_Part(_compact(group), _compact([slots[i] for i in group]), total, mask))
        return parts

    def _mask(self, rows: Rows, pick: Tensor, total: int, window: int | None) -> Tensor:
        """bool [b, 1, N, total]: the prefix, then tree rows by ancestor bit or causally; windows by position."""
        lengths, positions = rows.lengths[pick][:, None, None], rows.positions[pick][:, :, None]
        column = torch.arange(total, device=lengths.device)
        row = column - lengths  # [b, 1, total], index among the tree rows
        if rows.ancestors is None:
            sees = row <= torch.arange(positions.shape[1], device=column.device)[:, None]
        else:
            bits = (rows.ancestors[pick][:, :, None] >> row.clamp(0, 63)) & 1
            sees = (row < 0) | ((bits == 1) & (row < 64))
        if window is not None:
            sees = sees & (positions - self._key_positions(rows, pick, column) < window)
        return sees[:, None]

    def _key_positions(self, rows: Rows, pick: Tensor, column: Tensor) -> Tensor:
        """Positions of the cache rows [b, 1, total]: their index, but for tree rows their node's position."""
        lengths = rows.lengths[pick][:, None]
        if rows.ancestors is None:
            return column[None, None]
        assert rows.tree_positions is not None or rows.offset == 0, "a window needs all tree positions"
        tree = rows.positions if rows.tree_positions is None else rows.tree_positions
        row = column - lengths
        at = tree[pick].gather(1, row.clamp(0, tree.shape[1] - 1))
        return torch.where(row < 0, column, at)[:, None]

    def attend(
        self,
        query: Tensor,
        cache: KVCache,
        layer: int,
        plan: list[_Part],
        scale: float,
        softcap: float | None = None,
    ) -> Tensor:
        """query [B, N, H, D] -> [B, N, H, D]."""
        keys, values = cache.kv[layer, 0], cache.kv[layer, 1]
        if len(plan) == 1 and isinstance(plan[0].requests, slice):
            return _attend_part(query, keys, values, plan[0], scale, softcap)
        out = torch.empty_like(query)
        for part in plan:
            out[part.requests] = _attend_part(query[part.requests], keys, values, part, scale, softcap)
        return out


def _groups(totals: list[int], slots: list[int]) -> list[list[int]]:
    """Requests by length, cut where padding to the group's longest would cost more than TOGETHER_WASTE."""
    everyone = list(range(len(totals)))
    if isinstance(_compact(slots), slice) and len(totals) * max(totals) <= VIEW_WASTE * sum(totals):
        return [everyone]
    order = sorted(everyone, key=totals.__getitem__)
    groups: list[list[int]] = []
    room = 0.0
    for i in order:
        if not groups or totals[i] > room:
            groups.append([])
            room = totals[i] * TOGETHER_WASTE + 16
        groups[-1].append(i)
    return groups


def _compact(ids: list[int]) -> slice | Tensor:
    """A slice where the ids are a run: a view instead of a gathered copy."""
    run = ids == list(range(ids[0], ids[0] + len(ids)))
    return slice(ids[0], ids[0] + len(ids)) if run else torch.tensor(ids)


def _attend_part(
    query: Tensor, keys: Tensor, values: Tensor, part: _Part, scale: float, softcap: float | None
) -> Tensor:
    b, n, heads, d = query.shape
    keys, values = keys[part.slots, :, : part.total], values[part.slots, :, : part.total]
    groups = heads // keys.shape[1]
    packed = (
        query.view(b, n, keys.shape[1], groups, d)
        .permute(0, 2, 3, 1, 4)
        .reshape(b, keys.shape[1], groups * n, d)
    )
    bias = part.bias(groups, query.dtype)
    if softcap is None:
        out = F.scaled_dot_product_attention(packed, keys, values, attn_mask=bias, scale=scale)
    else:
        score = softcap * torch.tanh(packed.float() @ keys.float().transpose(-1, -2) * (scale / softcap))
        score = score if bias is None else score + bias
        out = (score.softmax(-1) @ values.float()).to(query.dtype)
    return out.view(b, keys.shape[1], groups, n, d).permute(0, 3, 1, 2, 4).reshape(b, n, heads, d)
