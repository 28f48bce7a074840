"""Pairs: accepted (feature, token) pairs the head has yet to read, kept on the device at fixed shapes.

The fixed-shape twin of EagleDrafter's lanes: a round that is one device program appends what it accepted here and the
next one reads it, neither asking the host. Rows read and pairs waiting always add up to the committed length.
Dimension legend: B requests, S slots, W pairs read at once, F feature width, H head size.

    head rows   0 1 ... L - c - 1 | L - c ... L - 1     c = counts[slot] pairs wait, for the last c rows
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.accept import Verdict
from specdec.attention.protocol import Rows, chunk_rows
from specdec.cache import RowIndex
from specdec.drafting.eagle import EagleDrafter
from specdec.drafting.protocol import Context
from specdec.fused import available

ROOM = 64  # pairs that may wait; more go to the drafter's lanes, where there is room for any number


class Pairs:
    """Padded buffers by slot.

    Args:
        drafter: whose head reads them, into whose cache.
        slots: S.
        width: W, pairs a round reads: one more than the deepest tree's depth.
        features: F.
        dtype: of the target's features.
    """

    def __init__(
        self, drafter: EagleDrafter, slots: int, width: int, features: int, dtype: torch.dtype
    ) -> None:
        device = drafter.last.device
        self.drafter, self.width = drafter, width
        self.features = torch.zeros(slots, ROOM + width, features, dtype=dtype, device=device)
        self.tokens = torch.zeros(slots, ROOM + width, dtype=torch.int64, device=device)
        self.counts = torch.zeros(slots, dtype=torch.int64, device=device)

    def read(self, context: Context) -> Tensor:
        """Let the head read what waits, at most W pairs each; its output at each request's last pair [B, H].

        Rows beyond a request's own pairs are written but never seen, and overwritten later.
        """
        slots, head = context.slots, self.drafter.head
        features, tokens, rows = self._take(context)
        last = self._leave(slots, self.drafter.forward(tokens, head.fuse(features), rows))
        self.counts.index_fill_(0, slots, 0)  # assigning a number would copy it from the host
        return last

    def _take(self, context: Context) -> tuple[Tensor, Tensor, Rows]:
        """W pairs of each request: features [B, W, F] in the head's dtype, tokens [B, W], and where they go."""
        slots, dtype = context.slots, self.drafter.head.dtype
        if available.runs(slots.device):
            from specdec.fused.pairs import take

            features, tokens, first, indices = take(
                self.features, self.tokens, slots, self.counts, context.lengths, self.width, dtype
            )
            return features, tokens, Rows(RowIndex(slots, indices), first, indices, None)
        rows = chunk_rows(slots, context.lengths - self.counts[slots], self.width, spans=False)
        return self.features[slots, : self.width].to(dtype), self.tokens[slots, : self.width], rows

    def _leave(self, slots: Tensor, y: Tensor) -> Tensor:
        """The output [B, H] at each request's last pair, remembered; y [B, W, H]."""
        if available.runs(slots.device):
            from specdec.fused.pairs import leave

            return leave(y, slots, self.counts, self.drafter.last)
        waiting = self.counts[slots]
        at = (waiting - 1).clamp(min=0)[:, None, None].expand(-1, 1, y.shape[2])
        last = torch.where(waiting[:, None] > 0, y.gather(1, at)[:, 0], self.drafter.last[slots])
        self.drafter.last[slots] = last
        return last

    def observe(self, slots: Tensor, features: Tensor, verdict: Verdict) -> None:
        """Append the accepted nodes' features [B, N, F] with the tokens that followed them; `counts` is left to who
        settles the round."""
        if available.runs(features.device):
            from specdec.fused.pairs import keep

            return keep(
                features, verdict.kept, verdict.tokens, slots, self.counts, self.features, self.tokens
            )
        waiting = self.counts[slots]
        place = waiting[:, None] + torch.arange(verdict.kept.shape[1], device=slots.device)
        kept = verdict.kept[..., None].expand(-1, -1, features.shape[2])
        self.features[slots[:, None], place] = features.gather(1, kept)
        self.tokens[slots[:, None], place] = verdict.tokens.clamp(min=0)

    def state(self) -> list[Tensor]:
        """What a round changes, by slot; the cache's rows beyond the committed ones aside."""
        return [self.features, self.tokens, self.counts, self.drafter.last]

    def wipe(self, slot: int) -> None:
        """Zero what a failed request left: the head reads a round's features before anybody knows that they are NaN,
        and in rows that a mask hides they would still spoil sums."""
        self.features[slot].zero_()
        self.drafter.cache.kv[:, :, slot].zero_()

    def hand_back(self, slot: int, length: int, waiting: int) -> None:
        """Move the `waiting` pairs of a slot of `length` committed tokens to the drafter's lane."""
        lane = self.drafter.lanes[slot]
        assert lane.features is not None and lane.tokens is not None, "handed back before admitted"
        lane.features.append(self.features[slot, :waiting].clone())
        lane.tokens.append(self.tokens[slot, :waiting].clone())
        lane.rows = length - self.drafter.pending(slot)
        self.counts[slot] = 0
