"""KVCache: one tensor of keys and values with a slot per request; rows are written, kept, copied.

Knows nothing of models or trees: rows arrive with the indices they belong to. Layout
`[layers, 2, slots, kv_heads, length, head_dim]`, so that compaction is one gather and one scatter (a loop in C
on CPUs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.errors import UnsupportedError
from specdec.fused import available
from specdec.native import placing

FEW = 2  # requests up to which rows are copied one request at a time


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What one model's cache looks like: layers, kv_heads, head_dim, and the dtype of its rows."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def row_bytes(self) -> int:
        """Bytes of one token in all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class RowIndex:
    """Where the N new rows of each of B requests are stored.

    Attributes:
        slots: int64 [B].
        indices: int64 [B, N] row in the slot.
        spans: the same on the host as (slot, first row) when rows are contiguous and the cache is on the CPU.
    """

    slots: Tensor
    indices: Tensor
    spans: Sequence[tuple[int, int]] | None = None


class KVCache:
    """Keys and values of up to `slots` requests of up to `length` rows each, allocated once.

    Args:
        shape: layers, heads and dtype of the model.
        slots: requests held at once.
        length: rows of each slot, draft rows included.

    Raises:
        UnsupportedError: when the memory for it is not to be had.
    """

    def __init__(self, shape: CacheShape, slots: int, length: int) -> None:
        self.shape, self.slots, self.length = shape, slots, length
        size = (shape.layers, 2, slots, shape.kv_heads, length, shape.head_dim)
        try:
            self.kv = torch.zeros(size, dtype=shape.dtype, device=shape.device)
        except RuntimeError as error:
            raise UnsupportedError(
                "not enough memory for the KV cache", field="slots x length", value=f"{slots} x {length}",
                remedy=f"It needs {slots * length * shape.row_bytes() / 2**30:.1f} GiB: "
                "lower max_length or slots.",
            ) from error  # fmt: skip

    def write(self, layer: int, rows: RowIndex, keys: Tensor, values: Tensor) -> None:
        """Store new rows. keys, values: [B, N, kv_heads, head_dim]."""
        plane = self.kv[layer]
        # slice copies beat index_put for a few requests
        if rows.spans is not None and len(rows.spans) <= FEW:
            for row, (slot, start) in enumerate(rows.spans):
                stop = start + keys.shape[1]
                plane[0, slot, :, start:stop] = keys[row].transpose(0, 1)
                plane[1, slot, :, start:stop] = values[row].transpose(0, 1)
            return
        slots = rows.slots[:, None].expand_as(rows.indices)
        plane[0][slots, :, rows.indices] = keys
        plane[1][slots, :, rows.indices] = values

    def keep(self, slots: Tensor, lengths: Tensor, kept: Tensor) -> None:
        """Compact: row `lengths + kept[:, j]` moves to `lengths + j` in every layer.

        Args:
            slots: int64 [B].
            lengths: int64 [B] committed rows.
            kept: int64 [B, D + 1] accepted nodes, root first.

        Rows beyond the accepted ones become garbage that the next round overwrites. No row is written before it is
        read, so overlaps are harmless.
        """
        if kept.device.type == "cpu":
            self._keep_on_host(slots.tolist(), lengths.tolist(), kept.tolist())
        else:
            self.compact(slots, lengths, kept)

    def compact(self, slots: Tensor, lengths: Tensor, kept: Tensor) -> None:
        """`keep` as one gather and one scatter that never wait for the host, on any device."""
        if available.runs(kept.device):
            from specdec.fused.settle import compact

            return compact(self.kv, slots, lengths, kept)
        place = torch.arange(kept.shape[1], device=kept.device)
        slot = slots[:, None].expand_as(kept)
        rows = self.kv.permute(2, 4, 0, 1, 3, 5)[slot, lengths[:, None] + kept]
        self.kv.permute(2, 4, 0, 1, 3, 5)[slot, lengths[:, None] + place] = rows

    def _keep_on_host(self, slots: list[int], lengths: list[int], kept: list[list[int]]) -> None:
        """Only rows that move; a chain accepted in place costs nothing."""
        for slot, length, nodes in zip(slots, lengths, kept, strict=True):
            moved = [(to, at) for to, at in enumerate(nodes) if at != to and (to == 0 or at != nodes[to - 1])]
            if moved:
                to, at = ([length + row for row in side] for side in zip(*moved, strict=True))
                if not placing.keep(self.kv, slot, to, at):
                    lane = self.kv[:, :, slot]
                    lane[:, :, :, to] = lane[:, :, :, at]

    def copy_prefix(self, source: int, target: int, rows: int) -> None:
        """Copy the first `rows` rows of slot `source` to slot `target` (a shared prompt)."""
        if source != target and rows:
            self.kv[:, :, target, :, :rows] = self.kv[:, :, source, :, :rows]

    def bytes(self) -> int:
        """Memory held."""
        return self.kv.numel() * self.kv.element_size()
