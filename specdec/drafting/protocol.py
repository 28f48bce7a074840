"""What a drafter is: it proposes trees for running requests and hears what became of them.

Dimension legend: B requests, N nodes, F feature width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specdec.accept import Verdict
from specdec.tree import DraftTree


@dataclass(frozen=True, slots=True)
class Shape:
    """The largest tree a round may use, and what a node and a level must promise to be worth their time.

    Attributes:
        depth: longest path in edges; 0 is plain decoding. A head stops after 64 // width + 1 levels: each row it has
            read for a tree is a bit of one word.
        width: children considered per node (EAGLE's top-k).
        nodes: N, the root included.
        node_floor: a node whose path probability is below is not verified.
        level_floor: growth stops where the frontier's summed path probability, a request, is below.
        sampled: draw one chain at random from the draft distribution instead of growing a deterministic tree.
        prices: tokens that verifying 1, 2, ... nodes of each request costs beyond one; empty when nodes are free.
        first_level, next_level: tokens that asking a head for the first level costs, and each further one.
    """

    depth: int
    width: int
    nodes: int
    node_floor: float = 0.0
    level_floor: float = 0.0
    prices: tuple[float, ...] = ()
    sampled: bool = False
    first_level: float = 0.0
    next_level: float = 0.0

    def worth(self, probs: Tensor) -> int:
        """The number of nodes, root included, whose expected gain beyond their price is largest.

        Args:
            probs: float [B, C] path probabilities of each request's candidates, falling along a row.
        """
        gains = self._gains(probs)
        if not self.prices:
            return 1 + len(gains)
        best = int(gains.argmax()) if len(gains) else 0
        return 2 + best if len(gains) and gains[best] > 0 else 1

    def gain(self, probs: Tensor) -> float:
        """What the nodes that `worth` counts are expected to bring, in tokens a request beyond their price."""
        gains = self._gains(probs)
        return float(gains.max()) if len(gains) else 0.0

    def _gains(self, probs: Tensor) -> Tensor:
        """Of the first 1, 2, ... candidates, beyond their price."""
        probs = probs[:, : self.nodes - 1]
        won = probs.mean(dim=0).cumsum(dim=0)
        if not self.prices:
            return won
        paid = torch.tensor(self.prices[1 : len(won) + 1], dtype=won.dtype, device=won.device)
        return won[: len(paid)] - paid

    def node_price(self, nodes: int) -> float:
        """Tokens that verifying so many nodes costs beyond one."""
        return self.prices[nodes - 1] if self.prices else 0.0

    def draft_price(self, levels: int) -> float:
        """Tokens that a head's drafting costs."""
        return self.first_level + (levels - 1) * self.next_level if levels else 0.0


PLAIN = Shape(0, 0, 1)


@dataclass(frozen=True, slots=True)
class Context:
    """The requests of one round.

    Attributes:
        slots: int64 [B], their cache slots; a drafter keeps its own state by slot.
        roots: int64 [B], newest emitted tokens.
        lengths: int64 [B], committed tokens = position of the root.
        temperature: float32 [B], what the target's logits are divided by; 0 is greedy.
        draws: float64 [B, D] fresh random numbers for sampled chains, or None where trees are deterministic.
        fixed: the round is one program of fixed shapes: nobody may read these tensors on the host.
        only: of each request, the one source that may draft for it (see `Drafter.sources`) or None for all of them;
            None when nobody asks for one.
    """

    slots: Tensor
    roots: Tensor
    lengths: Tensor
    temperature: Tensor | None = None
    draws: Tensor | None = None
    fixed: bool = False
    only: tuple[str | None, ...] | None = None


class Drafter(Protocol):
    """Proposes trees. State is kept per slot and forgotten with `release`.

    Attributes:
        name: for people.
        taps: layer inputs of the target it wants to see.
        sources: where its drafts come from, "head" or "ngram"; a request may ask for one of them alone.
    """

    name: str
    taps: tuple[int, ...]
    sources: tuple[str, ...]

    def admit(self, slot: int, tokens: Tensor, features: Tensor, root: int) -> None:
        """A request starts.

        Args:
            slot: its cache slot.
            tokens: int64 [P], the prompt.
            features: [P - s, F], the target's taps over its tail (width 0 when `taps` is empty); the first s rows
                were taken over with `reuse`.
            root: the first emitted token.
        """
        ...

    def reuse(self, source: int, slot: int, rows: int) -> int:
        """Take over the state of the first `rows` tokens of slot `source`; returns how many could be kept."""
        ...

    def propose(self, context: Context, shape: Shape) -> DraftTree:
        """Trees of at most `shape.nodes` nodes; a drafter with nothing to say returns roots alone."""
        ...

    def observe(self, context: Context, features: Tensor, verdict: Verdict) -> None:
        """What the target kept: features [B, N, F] of the tree's nodes, and the verdict."""
        ...

    def release(self, slot: int) -> None:
        """The request in this slot is gone."""
        ...
