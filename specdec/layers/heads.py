"""New heads of a layer's rows: turned to their positions, and stored, in one pass where there is a kernel for it.

Dimension legend: B requests, N rows, Q query heads, G KV heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from specdec.cache import KVCache, RowIndex
from specdec.fused import layer as fused
from specdec.layers.rope import Angles, rotate
from specdec.native import placing as native


@dataclass(frozen=True, slots=True)
class Heads:
    """What one packed product gave, not yet turned.

    Attributes:
        packed: [B, N, Q + 2 * G, D], contiguous: queries, then keys, then values.
        kv_heads: G.
        angles: of the rows.
    """

    packed: Tensor
    kv_heads: int
    angles: Angles

    def turned(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, N, Q, D], keys and values [B, N, G, D]."""
        values = self.packed.shape[2] - self.kv_heads
        keys = values - self.kv_heads
        qk = rotate(self.packed[:, :, :values], *self.angles.values())
        return qk[:, :, :keys], qk[:, :, keys:], self.packed[:, :, values:]

    def store(self, cache: KVCache, layer: int, index: RowIndex, ahead: Tensor | None = None) -> Tensor:
        """Write turned keys and values to a layer of the cache; turned queries [B, N, Q, D], `packed` is used up.

        Args:
            ahead: a weight that is wanted right after attention, to be brought nearer meanwhile where that helps.
        """
        plane, queries = cache.kv[layer], self.packed.shape[2] - 2 * self.kv_heads
        if native.can_place(self.packed, plane):
            native.place(self.packed, *self.angles.values(), plane, index.slots, index.indices)
            return self.packed[:, :, :queries]
        if fused.can_place(self.packed, plane):
            rope, positions = self.angles.rope, self.angles.positions
            fused.place(self.packed, rope.cos, rope.sin, positions, plane, index.slots, index.indices, ahead)
            return self.packed[:, :, :queries]
        query, key, value = self.turned()
        cache.write(layer, index, key, value)
        return query
