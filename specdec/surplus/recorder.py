"""EngineRecorder: what the real engine did, round by round, kept in bounded memory.

Attached as `engine.recorder`, it hears every `Round` and keeps per request: the target's mass on the children of each
node of the accepted path, the draft's confidence there, whether a child was accepted, and the tree's expected length
under the target's own law. Knows rounds and request ids; who asked and how tokens are counted for tau is the engine's
business (`stats.Counters`). Dimension legend: B requests, N nodes, D depth, V vocabulary, n events.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdec.stats import Round
from specdec.tree import DraftTree, mask

EVENTS = 2_000_000
"""Events kept, about 80 MB; later ones are counted and left out."""
TREES = 64
"""Tree shapes kept, a uniform sample of all."""


@dataclass(frozen=True, slots=True)
class Event:
    """Rows of what happened, one per depth reached; [n] each.

    Attributes:
        doc: int64, of the request.
        depth: int64, from 1.
        accepted: bool, was a child at this depth accepted?
        mass: float32, the target's mass on the children on offer there.
        confidence: float32, the draft's probability of its likeliest child; NaN where it gave no scores.
    """

    doc: Tensor
    depth: Tensor
    accepted: Tensor
    mass: Tensor
    confidence: Tensor


@dataclass(frozen=True, slots=True)
class TreeShape:
    """A tree without its tokens: parent of each node and its rank among its siblings, best 0."""

    parents: tuple[int, ...]
    ranks: tuple[int, ...]


@dataclass(slots=True)
class EngineRecorder:
    """A `stats.Recorder`.

    Attributes:
        docs: document number of each request id; rounds of other requests are ignored.
        temperature: of serving, to turn logits into the law that decides; 0 is greedy.
        limit: events kept.
        seed: of the sample of trees.
        rounds, emitted, expected: per document: rounds heard, tokens they emitted, and the sum over rounds of
            the tree's expected length under the target's law (bonus included); NaN for sampled chains.
        dropped: events beyond `limit`.
    """

    docs: Mapping[str, int]
    temperature: float = 1.0
    limit: int = EVENTS
    seed: int = 0
    rounds: dict[int, int] = field(default_factory=dict)
    emitted: dict[int, int] = field(default_factory=dict)
    expected: dict[int, float] = field(default_factory=dict)
    dropped: int = 0
    _parts: list[tuple[Tensor, ...]] = field(default_factory=list)
    _kept: int = 0
    _shapes: list[TreeShape] = field(default_factory=list)
    _heard: int = 0
    _random: random.Random = field(default_factory=random.Random)

    def __post_init__(self) -> None:
        self._random.seed(self.seed)

    @torch.inference_mode()
    def record(self, round: Round) -> None:
        """Copy what is wanted of one round."""
        rows = [row for row, name in enumerate(round.requests) if name in self.docs]
        if not rows:
            return
        tree = round.tree
        chance = node_probs(tree, round.logits, self.temperature)
        expected = expected_length(tree, chance)
        # a sampled chain is not walked: its rule keeps more than the children's mass
        if tree.probs is not None:
            expected = torch.full_like(expected, float("nan"))
        mass, confidence = _offers(tree, chance)
        for row in rows:
            doc = self.docs[round.requests[row]]
            count = int(round.verdict.counts[row])
            self.rounds[doc] = self.rounds.get(doc, 0) + 1
            self.emitted[doc] = self.emitted.get(doc, 0) + count
            self.expected[doc] = self.expected.get(doc, 0.0) + float(expected[row])
            reached = min(int(round.verdict.offered[row]), count)
            self._keep(doc, round.verdict.kept[row, :reached], count, mass[row], confidence[row])
            self._sample(tree, row)

    def _keep(self, doc: int, path: Tensor, count: int, mass: Tensor, confidence: Tensor) -> None:
        reached = path.shape[0]
        room = min(reached, self.limit - self._kept)
        self.dropped += reached - room
        if room <= 0:
            return
        depth = torch.arange(1, room + 1)
        at = path[:room]
        values = (torch.full((room,), doc), depth, depth < count, mass[at].cpu(), confidence[at].cpu())
        self._parts.append(values)
        self._kept += room

    def _sample(self, tree: DraftTree, row: int) -> None:
        """Reservoir sampling: every tree heard so far is equally likely to be kept."""
        self._heard += 1
        place = len(self._shapes) if len(self._shapes) < TREES else self._random.randrange(self._heard)
        if place < TREES:
            shape = _shape(tree, row)
            self._shapes[place : place + 1] = [shape]

    def events(self) -> Event:
        """Everything kept, as columns."""
        if not self._parts:
            empty = torch.zeros(0)
            return Event(empty.long(), empty.long(), empty.bool(), empty, empty)
        return Event(*(torch.cat(column) for column in zip(*self._parts, strict=True)))

    @property
    def shapes(self) -> tuple[TreeShape, ...]:
        """A sample of the trees that were verified."""
        return tuple(self._shapes)


def node_probs(tree: DraftTree, logits: Tensor, temperature: float) -> Tensor:
    """The target's probability of each node's token after its parent, float32 [B, N]; 0 for padding, 1 for roots.

    Args:
        logits: [B, N, V] of the target.
        temperature: of serving; 0 is greedy.
    """
    wide = logits.float()
    parent = tree.parents
    if temperature > 0:
        scaled = wide / temperature
        norm = scaled.logsumexp(-1).gather(1, parent)
        at_parent = scaled[torch.arange(len(parent), device=parent.device)[:, None], parent, tree.tokens]
        chance = (at_parent - norm).exp()
    else:
        chance = (wide.argmax(-1).gather(1, parent) == tree.tokens).float()
    inert = torch.arange(tree.nodes, device=parent.device) >= tree.sizes[:, None]
    chance = chance.masked_fill(inert, 0.0)
    chance[:, 0] = 1.0
    return chance


def expected_length(tree: DraftTree, chance: Tensor) -> Tensor:
    """Tokens a round emits on average under the target's law: the sum over nodes of their path probability, [B]."""
    above = mask(tree.ancestors, tree.nodes)
    paths = torch.where(above, chance[:, None, :], torch.ones_like(chance[:, None, :])).prod(-1)
    inert = torch.arange(tree.nodes, device=chance.device) >= tree.sizes[:, None]
    total: Tensor = paths.masked_fill(inert, 0.0).sum(-1)
    return total


def _offers(tree: DraftTree, chance: Tensor) -> tuple[Tensor, Tensor]:
    """Per node: the target's mass on its children, and the draft's probability of the likeliest of them."""
    child = chance.clone()
    child[:, 0] = 0.0
    mass = torch.zeros_like(chance).scatter_add_(1, tree.parents, child)
    if tree.scores is None:
        return mass, torch.full_like(chance, float("nan"))
    step = (tree.scores - tree.scores.gather(1, tree.parents)).exp().nan_to_num(0.0)
    step[:, 0] = 0.0
    return mass, torch.zeros_like(chance).scatter_reduce_(1, tree.parents, step.float(), "amax")


def _shape(tree: DraftTree, row: int) -> TreeShape:
    size = int(tree.sizes[row])
    parents = tree.parents[row, :size].tolist()
    scores = [-float(i) for i in range(size)] if tree.scores is None else tree.scores[row, :size].tolist()
    ranks = [0] * size
    for node in range(1, size):
        better = (
            other
            for other in range(1, size)
            if parents[other] == parents[node] and (-scores[other], other) < (-scores[node], node)
        )
        ranks[node] = sum(1 for _ in better)
    return TreeShape(tuple(parents), tuple(ranks))
