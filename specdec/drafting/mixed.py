"""MixedDrafter: a draft head and n-gram lookups grow one tree; the head is asked only where it pays.

What the text repeats is found by lookup for nothing and may run deep; everything else the head guesses better. Both
give probabilities, so their nodes compete in one tree. Knows neither the head's weights nor the automaton.

    lookup   root -> b -> c -> d            merged   root -> b -> c -> d      where both speak, doubts multiply
    head     root -> b -> x                                   `---> x         1 - (1 - p)(1 - q), siblings at most 1
                 `-> e                                  `---> e
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from specdec.accept import Verdict
from specdec.drafting.eagle import EagleDrafter
from specdec.drafting.ngram import NgramDrafter
from specdec.drafting.protocol import Context, Shape
from specdec.drafting.sketch import Sketch, falling, of_tree, to_tree
from specdec.tree import DraftTree, root_only

PROMISES = (0.0, 0.1, 0.4, 1.0, 2.0)  # lower edges of the tokens that lookups alone promise a round
# tokens that asking the head is taken to add before anything was seen, where two levels and two nodes cost USUAL
PRIOR, USUAL = (0.4, 0.3, 0.2, 0.0, -0.2), 0.25
PRIOR_ROUNDS = 6.0  # rounds the prior counts for
DECAY = 0.95  # of what was seen: about the last twenty rounds
# rounds between two questions to a head that does not pay, for each request: it has to read first what all of them
# wrote meanwhile
SHORTEST_WAIT, LONGEST_WAIT = 4, 64
SUREST = 0.999  # no edge is certain, so that a child never ranks with its parent


@dataclass(slots=True)
class _Advantage:
    """What the head added over lookups alone, in tokens, where lookups promised about the same."""

    prior: float
    size: int = 1
    total: float = 0.0
    rounds: float = 0.0
    waited: int = 0
    wait: int = SHORTEST_WAIT

    def mean(self) -> float:
        """Tokens a round."""
        return (self.total + PRIOR_ROUNDS * self.prior) / (self.rounds + PRIOR_ROUNDS)

    def worth_asking(self) -> bool:
        """Does the head pay, or has it not been asked for long?"""
        if self.mean() > 0:
            return True
        self.waited += 1
        if self.waited < self.wait * self.size:
            return False
        self.waited, self.wait = 0, min(2 * self.wait, LONGEST_WAIT)
        return True

    def note(self, gained: float) -> None:
        """A round with the head gained so many tokens more than lookups had promised."""
        self.total = self.total * DECAY + gained
        self.rounds = self.rounds * DECAY + 1
        if self.mean() > 0:
            self.wait = SHORTEST_WAIT


@dataclass(frozen=True, slots=True)
class _Asked:
    """A round the head took part in, until its outcome is known."""

    advantage: _Advantage
    promised: float
    paid: float


@dataclass(slots=True)
class MixedDrafter:
    """Trees out of a draft head and the request's own text.

    Args:
        head: asked where it is expected to add more than it costs.
        lookup: asked every round.
    """

    head: EagleDrafter
    lookup: NgramDrafter = field(default_factory=NgramDrafter)
    advantages: dict[int, list[_Advantage]] = field(default_factory=dict)  # by batch size, in powers of two
    name: str = field(default="eagle+ngram", init=False)
    taps: tuple[int, ...] = field(init=False)
    sources: tuple[str, ...] = field(default=("head", "ngram"), init=False)
    _asked: _Asked | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.taps = self.head.taps

    def admit(self, slot: int, tokens: Tensor, features: Tensor, root: int) -> None:
        """Both remember the prompt."""
        self.head.admit(slot, tokens, features, root)
        self.lookup.admit(slot, tokens, features, root)

    def reuse(self, source: int, slot: int, rows: int) -> int:
        """What the head can take over; lookups index every prompt anew."""
        return self.head.reuse(source, slot, rows)

    def propose(self, context: Context, shape: Shape) -> DraftTree:
        """The likeliest nodes of both, as many as are worth their price."""
        self._asked = None
        if shape.sampled:
            return self.head.propose(context, shape)
        if shape.depth == 0 or shape.nodes == 1:
            return root_only(context.roots)
        found = self._may(context, "ngram", self.lookup.sketch(context, replace(shape, level_floor=0.0)))
        promised = max(shape.gain(falling(found)), 0.0)
        advantage = self._advantages(len(context.roots), shape)[sum(promised >= e for e in PROMISES[1:])]
        levels = 0
        if self._asks_head(context, shape, advantage):
            drafted = self.head.propose(context, replace(shape, prices=()))
            levels, heads = drafted.levels, self._may(context, "head", of_tree(drafted))
            found = [merge(own, other, shape.nodes) for own, other in zip(found, heads, strict=True)]
        nodes = shape.worth(falling(found))
        if levels and context.only is None:
            self._asked = _Asked(advantage, promised, shape.draft_price(levels) + shape.node_price(nodes))
        if nodes == 1:
            return replace(root_only(context.roots), levels=levels)
        return replace(
            to_tree([sketch.first(nodes) for sketch in found], context.roots.device), levels=levels
        )

    def _advantages(self, batch: int, shape: Shape) -> list[_Advantage]:
        """What is known at this batch size: many requests make nodes and levels dear, so it says nothing of others."""
        size = 1 << (batch - 1).bit_length()
        if size not in self.advantages:
            dear = max(shape.draft_price(2) + shape.node_price(2) - USUAL, 0.0)
            self.advantages[size] = [_Advantage(prior - dear, size) for prior in PRIOR]
        return self.advantages[size]

    def _asks_head(self, context: Context, shape: Shape, advantage: _Advantage) -> bool:
        """Where somebody wants the head alone it is asked, where nobody may have it it is not; else where it pays."""
        only = context.only or (None,)
        if "head" in only:
            return True
        if all(one == "ngram" for one in only):
            return False
        return not shape.prices or advantage.worth_asking()

    @staticmethod
    def _may(context: Context, source: str, sketches: Sequence[Sketch]) -> list[Sketch]:
        """Bare roots for requests that want another source alone."""
        if context.only is None:
            return list(sketches)
        return [
            sketch if one in (None, source) else sketch.first(1)
            for sketch, one in zip(sketches, context.only, strict=True)
        ]

    def observe(self, context: Context, features: Tensor, verdict: Verdict) -> None:
        """Both hear what the target kept; after rounds with the head, what it was worth is noted."""
        self.head.observe(context, features, verdict)
        self.lookup.observe(context, features, verdict)
        if self._asked is not None:
            accepted = float(verdict.counts.double().mean()) - 1
            self._asked.advantage.note(accepted - self._asked.paid - self._asked.promised)
            self._asked = None

    def release(self, slot: int) -> None:
        """Both forget the request."""
        self.head.release(slot)
        self.lookup.release(slot)


def merge(left: Sketch, right: Sketch, nodes: int) -> Sketch:
    """The likeliest nodes of two trees over the same root, at most `nodes`, best first.

    An edge in both gets 1 - (1 - p)(1 - q): two sources that agree are right more often than either. Siblings whose
    sum exceeds one are scaled down to it.
    """
    children: list[dict[int, int]] = [{}]
    edges: list[float] = [1.0]
    for sketch in (left, right):
        place = [0]
        for node in range(1, len(sketch.tokens)):
            above, token = sketch.parents[node], sketch.tokens[node]
            p = min(math.exp(sketch.scores[node] - sketch.scores[above]), SUREST)
            at = children[place[above]].setdefault(token, len(edges))
            if at == len(edges):
                children.append({})
                edges.append(p)
            else:
                edges[at] = 1 - (1 - edges[at]) * (1 - p)
            place.append(at)
    return _best_first(left.tokens[0], children, edges, nodes)


def _best_first(root: int, children: list[dict[int, int]], edges: list[float], nodes: int) -> Sketch:
    """The likeliest paths of a tree of candidates: `children[i]` by token, `edges[i]` the probability of reaching i
    from its parent."""
    sketch = Sketch([root])
    heap: list[tuple[float, int, int, int]] = []  # (-score, candidate, parent in the sketch, token)

    def push(candidate: int, parent: int) -> None:
        total = max(sum(edges[child] for child in children[candidate].values()), 1.0)
        for token, child in children[candidate].items():
            score = sketch.scores[parent] + math.log(max(min(edges[child] / total, SUREST), 1e-30))
            heapq.heappush(heap, (-score, child, parent, token))

    push(0, 0)
    while heap and len(sketch.tokens) < nodes:
        negative, candidate, parent, token = heapq.heappop(heap)
        push(candidate, sketch.add(token, parent, -negative))
    return sketch
