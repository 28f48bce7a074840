"""Growth: the candidates of one proposal, level by level (EAGLE-2), until the likeliest of them become trees.

Knows draft distributions and path scores, nothing of heads or caches.
Dimension legend: B requests, K width, H head size, Vd draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec import tree as trees
from specdec.drafting.protocol import Shape
from specdec.fused import available
from specdec.sampling import top_log_probs
from specdec.tree import MAX_NODES, DraftTree


class Growth:
    """The candidates of one proposal, level by level.

    Attributes:
        tokens: int64 [B, K] target ids of the frontier.
        bits: int64 [B, K] ancestor words of the frontier's head rows.
        depth: of the frontier.
        rows_before: head rows written by earlier levels.
    """

    def __init__(self, ids: Tensor, shape: Shape) -> None:
        self.ids, self.shape = ids, shape
        self.width = min(shape.width, len(ids))
        self.depth, self.rows_before = 0, 0
        self.tokens: Tensor
        self.bits: Tensor
        self.scores: Tensor
        self.at: Tensor
        self.all_tokens: list[Tensor] = []
        self.all_scores: list[Tensor] = []
        self.all_parents: list[Tensor] = []
        self.count = 0

    def level(self, logits: Tensor, y: Tensor) -> Tensor:
        """Take the frontier's draft logits [B, K', Vd] and the outputs y [B, K', H] they were read off; returns the new
        frontier's parent outputs [B, K, H]."""
        log_probs, drafts = top_log_probs(logits, self.width)
        b, rows, _ = log_probs.shape
        first = self.depth == 0
        scores = log_probs.new_zeros(b, 1) if first else self.scores
        paths, frontier = trees.expand(scores, log_probs)
        frontier = self._likely(frontier, paths)
        parent = torch.arange(rows, device=drafts.device).repeat_interleave(self.width).expand(b, -1)
        above = torch.full_like(parent, -1) if first else self.at.gather(1, parent)
        self.all_tokens.append(self.ids[drafts.flatten(1)])
        self.all_scores.append(paths)
        self.all_parents.append(above)
        self._advance(frontier, parent.gather(1, frontier), paths, first)
        index = parent.gather(1, frontier)[..., None].expand(-1, -1, y.shape[-1])
        return y.gather(1, index)

    def _likely(self, frontier: Tensor, paths: Tensor) -> Tensor:
        """Those of the frontier, likeliest first, whose children may be worth their price, at least one."""
        if self.shape.node_floor <= 0:
            return frontier
        likely = paths.gather(1, frontier).exp() >= self.shape.node_floor
        return frontier[:, : max(int(likely.sum(dim=1).max()), 1)]

    def _advance(self, frontier: Tensor, parent_row: Tensor, paths: Tensor, first: bool) -> None:
        k = frontier.shape[1]
        self.rows_before = 0 if first else self.rows_before + self.bits.shape[1]
        own = torch.ones((), dtype=torch.int64, device=frontier.device) << (
            self.rows_before + torch.arange(k, device=frontier.device)
        )
        self.bits = own.expand_as(frontier) if first else self.bits.gather(1, parent_row) | own
        self.tokens = self.all_tokens[-1].gather(1, frontier)
        self.scores = paths.gather(1, frontier)
        self.at = frontier + self.count
        self.count += paths.shape[1]
        self.depth += 1

    def worth_another(self) -> bool:
        """May the tree grow deeper, and does the frontier still promise enough?"""
        if self.depth >= self.shape.depth or self.rows_before + self.bits.shape[1] > MAX_NODES:
            return False
        if self.shape.level_floor <= 0:
            return True
        return self.promise() >= self.shape.level_floor

    def promise(self) -> float:
        """The path probability that the frontier holds, of a request."""
        return float(self.scores.exp().sum(dim=1).mean())

    def finish(self, roots: Tensor) -> DraftTree:
        """The tree of the likeliest nodes that are worth their price."""
        nodes = self.worth() if self.shape.prices else self.shape.nodes
        return trees.root_only(roots) if nodes == 1 else self.tree(roots, nodes)

    def worth(self) -> int:
        """Nodes, the root included, that are worth their price: see `Shape.worth`."""
        scores = self.path_scores()
        return self.shape.worth(scores.topk(min(self.shape.nodes - 1, scores.shape[1]), dim=1).values.exp())

    def path_scores(self) -> Tensor:
        """float32 [B, C] of all candidates, level by level."""
        return torch.cat(self.all_scores, dim=1)

    def tree(self, roots: Tensor, nodes: int) -> DraftTree:
        """The tree of the `nodes - 1` likeliest candidates."""
        tokens, parents = torch.cat(self.all_tokens, dim=1), torch.cat(self.all_parents, dim=1)
        return trees.rerank(roots, tokens, parents, self.path_scores(), nodes)


def growth_of(ids: Tensor, shape: Shape, dtype: torch.dtype) -> Growth:
    """The growth of a proposal of this shape: by fused or C kernels where they apply.

    Args:
        ids: int64 [Vd], target id of each draft-vocabulary entry.
        dtype: of the draft logits.
    """
    width = min(shape.width, len(ids))
    if available.runs(ids.device):
        from specdec.drafting.fused_growth import FusedGrowth
        from specdec.drafting.fused_growth import fits as fused_fits

        if fused_fits(width, shape):
            return FusedGrowth(ids, shape)
    from specdec.drafting.native_growth import NativeGrowth
    from specdec.drafting.native_growth import fits as native_fits

    return NativeGrowth(ids, shape) if native_fits(ids, width, shape, dtype) else Growth(ids, shape)
