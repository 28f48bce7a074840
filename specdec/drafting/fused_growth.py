"""FusedGrowth: the candidates of one proposal by Triton kernels, three launches where torch makes dozens.

Dimension legend: B requests, K width, C candidates, H head size, N nodes, Vd draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.drafting.growth import Growth
from specdec.drafting.protocol import Shape
from specdec.fused import growth as kernels
from specdec.tree import MAX_NODES, DraftTree


class FusedGrowth(Growth):
    """See `Growth`; every shape that `fits` is grown alike."""

    found: kernels.Candidates

    def level(self, logits: Tensor, y: Tensor) -> Tensor:
        """See `Growth.level`."""
        b, rows, _ = logits.shape
        first = self.depth == 0
        if first:
            self.found = kernels.Candidates.room(
                b, kernels.capacity(self.width, self.shape.depth), logits.device
            )
        self.rows_before = 0 if first else self.rows_before + self.width
        old = None if first else (self.scores, self.at, self.bits)
        tokens, at, bits = (self.ids.new_empty(b, self.width) for _ in range(3))
        scores = logits.new_empty((b, self.width), dtype=torch.float32)
        new_y = y.new_empty(b, self.width, y.shape[2])
        new = (tokens, scores, at, bits, new_y)
        found = kernels.shares(logits.flatten(0, 1), self.width)
        kernels.grow(found, self.ids, old, y, self.found, new, self.count, self.rows_before)
        self.tokens, self.scores, self.at, self.bits = tokens, scores, at, bits
        self.count += rows * self.width
        self.depth += 1
        return new_y

    def path_scores(self) -> Tensor:
        """See `Growth.path_scores`."""
        return self.found.scores[:, : self.count]

    def tree(self, roots: Tensor, nodes: int) -> DraftTree:
        """See `Growth.tree`."""
        return DraftTree(*kernels.rerank(roots, self.found, self.count, nodes))


def fits(width: int, shape: Shape) -> bool:
    """Can the kernels grow trees of this shape?"""
    return width <= kernels.WIDEST and shape.nodes <= MAX_NODES
