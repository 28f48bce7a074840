"""What one forward needs to know about its rows, and what an attention backend must offer.

Dimension legend: B requests, N new rows of each, H heads, D head size.

    cache slot:  [0 .......... lengths) committed | offset older tree rows | N new rows
    a new row sees every committed row, and those tree rows whose bit is set in its ancestor word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from specdec.cache import KVCache, RowIndex
from specdec.tree import DraftTree


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the rows of one forward live and whom they see.

    Attributes:
        index: cache rows the new keys and values are written to.
        lengths: int64 [B] committed rows of each slot.
        positions: int64 [B, N] RoPE positions.
        ancestors: int64 [B, N] words over the tree rows (bit j = cache row lengths + j), or None for a causal
            chunk: row i sees everything up to itself.
        offset: tree rows that were stored by earlier forwards of the same round.
        tree_positions: int64 [B, offset + N] positions of all stored tree rows; only sliding windows read it.
    """

    index: RowIndex
    lengths: Tensor
    positions: Tensor
    ancestors: Tensor | None
    offset: int = 0
    tree_positions: Tensor | None = None

    @property
    def slots(self) -> Tensor:
        return self.index.slots


def _index(slots: Tensor, first: Tensor, n: int, spans: bool) -> RowIndex:
    """Rows behind `first`; their spans on a CPU, unless the caller must not read tensors (`spans` False)."""
    indices = first[:, None] + torch.arange(n, device=slots.device)
    if not spans or slots.device.type != "cpu":
        return RowIndex(slots, indices)
    return RowIndex(slots, indices, list(zip(slots.tolist(), first.tolist(), strict=True)))


def chunk_rows(slots: Tensor, lengths: Tensor, n: int, *, spans: bool = True) -> Rows:
    """Rows of a causal chunk of n tokens that continues each slot (prefill, head extension)."""
    index = _index(slots, lengths, n, spans)
    return Rows(index, lengths, index.indices, None)


def tree_rows(slots: Tensor, lengths: Tensor, tree: DraftTree, *, spans: bool = True) -> Rows:
    """Rows of a tree verification: node i sits at position length + depth(i), cache row length + i."""
    positions = lengths[:, None] + tree.depths
    index = _index(slots, lengths, tree.nodes, spans)
    return Rows(index, lengths, positions, tree.ancestors, 0, positions)


def level_rows(slots: Tensor, lengths: Tensor, positions: Tensor, ancestors: Tensor, offset: int,
               tree_positions: Tensor | None = None) -> Rows:  # fmt: skip
    """Rows of one drafting level: n new rows behind `offset` older rows of the same round.

    positions int64 [B, n], ancestors int64 [B, n] over all tree rows so far, tree_positions int64 [B, offset + n].
    """
    index = _index(slots, lengths + offset, positions.shape[1], spans=True)
    return Rows(index, lengths, positions, ancestors, offset, tree_positions)


@dataclass(frozen=True, slots=True)
class Levels:
    """Where the drafting levels of one round go when all are equally wide: found for all at once.

    Attributes:
        slots, lengths: int64 [B].
        positions, indices: int64 [levels, B, K], RoPE positions and cache rows of the second level's nodes, the third
            level's, ...: the first level costs no rows.
        windowed: are the positions of older levels wanted, too?
    """

    slots: Tensor
    lengths: Tensor
    positions: Tensor
    indices: Tensor
    windowed: bool = False

    @staticmethod
    def of(slots: Tensor, lengths: Tensor, width: int, levels: int, windowed: bool = False) -> Levels:
        """Of so many levels with K = `width` nodes a request."""
        row = torch.arange(levels * width, device=lengths.device).view(levels, 1, width)
        return Levels(slots, lengths, row // width + lengths[:, None], row + lengths[:, None], windowed)

    def rows(self, level: int, ancestors: Tensor) -> Rows:
        """`level_rows` of one level, the first with rows being 0."""
        index, offset = RowIndex(self.slots, self.indices[level]), level * self.indices.shape[2]
        so_far = self.positions[: level + 1].transpose(0, 1).flatten(1) if self.windowed else None
        return Rows(index, self.lengths, self.positions[level], ancestors, offset, so_far)


class TreeAttention(Protocol):
    """An attention backend; chosen once per engine."""

    name: str

    def plan(self, rows: Rows, cache: KVCache, window: int | None) -> Any:
        """Work shared by all layers of one forward with one window: masks, spans, splits."""
        ...

    def attend(
        self, query: Tensor, cache: KVCache, layer: int, plan: Any, scale: float, softcap: float | None = None
    ) -> Tensor:
        """Attention of query [B, N, H, D] over rows that are already written. Returns [B, N, H, D]."""
        ...
