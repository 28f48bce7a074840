"""NgramDrafter: proposes what followed the same words earlier in the prompt or the output.

Needs no training and no features; knows nothing of the target. Per slot a suffix automaton indexes the text;
trees grow best first by estimated path probability. The estimates come from counts of how often continuations
held before, pooled over all requests of the drafter, so floors on the probability cut what does not pay.

    text      the cat sat . the cat ran . the cat | root = cat, match "the cat" (and ". the cat", ...)
    tree      cat -> ran -> .        what followed most often, the most recent first among equals
               `---> sat -> .        other continuations, then those of shorter matches
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from specdec.accept import Verdict
from specdec.drafting.automaton import START, SuffixAutomaton
from specdec.drafting.protocol import Context, Shape
from specdec.drafting.sketch import Sketch, falling, to_tree
from specdec.tree import MAX_NODES, DraftTree, root_only

RANKS = 6  # children considered per node at most
LENGTHS = (1, 2, 3, 4, 6, 9, 17)  # lower edges of the match length buckets
DEPTHS = (0, 1, 2, 4, 8)  # lower edges of the depth buckets
SOLE, REPEATED, LEADING, MIXED = range(4)  # one earlier occurrence; many alike; most alike; differing
# measured on answers of smollm2-135m to training prompts, greedy and sampled: the first child's probability
# by unanimity and match length, and what each later child takes of the rest
FIRST = (
    (0.22, 0.47, 0.58, 0.66, 0.75, 0.84, 0.96), (0.52, 0.73, 0.76, 0.84, 0.87, 0.92, 0.93),
    (0.32, 0.40, 0.40, 0.46, 0.53, 0.63, 0.85), (0.12, 0.23, 0.25, 0.32, 0.36, 0.45, 0.72),
)  # fmt: skip
LATER = (
    (0.08, 0.035, 0.012, 0.007, 0.003), (0.09, 0.03, 0.01, 0.008, 0.004),
    (0.20, 0.07, 0.03, 0.015, 0.01), (0.22, 0.08, 0.035, 0.018, 0.01),
)  # fmt: skip
PRIOR_TRIALS = 16.0  # trials the prior counts for
MEMORY = 512.0  # trials after which counts are halved, so that estimates follow the traffic
LEARNED = 16  # rounds of a text nobody asked about that are still learned from


def _buckets(edges: Sequence[int], top: int) -> list[int]:
    return [sum(value >= edge for edge in edges[1:]) for value in range(top + 1)]


_LENGTH_BUCKET, _DEPTH_BUCKET = _buckets(LENGTHS, LENGTHS[-1]), _buckets(DEPTHS, MAX_NODES)


class Calibration:
    """How often continuations held: by match length, depth and unanimity, for each rank among siblings.

    The ranks of one node exclude each other, so their probabilities sum to less than one.
    """

    def __init__(self) -> None:
        priors = [
            [first[length], *((1 - first[length]) * share for share in later)]
            for length in range(len(LENGTHS))
            for _ in DEPTHS
            for first, later in zip(FIRST, LATER, strict=True)
        ]
        self._hits = [[p * PRIOR_TRIALS for p in prior] for prior in priors]
        self._trials = [PRIOR_TRIALS] * len(self._hits)
        self._logs: list[list[float] | None] = [None] * len(self._hits)

    @staticmethod
    def bucket(length: int, depth: int, unanimity: int) -> int:
        """The bucket of a node whose `length` newest tokens matched, at `depth` below the root."""
        row = _LENGTH_BUCKET[min(length, LENGTHS[-1])] * len(DEPTHS) + _DEPTH_BUCKET[depth]
        return row * len(FIRST) + unanimity

    def logs(self, bucket: int) -> list[float]:
        """Log-probability that the target goes on with the child of each rank."""
        logs = self._logs[bucket]
        if logs is None:
            trials = self._trials[bucket]
            logs = self._logs[bucket] = [math.log(hits / trials) for hits in self._hits[bucket]]
        return logs

    def note(self, bucket: int, rank: int | None) -> None:
        """The target went on with the child of this rank, or with none of them."""
        hits = self._hits[bucket]
        self._trials[bucket] += 1
        if rank is not None:
            hits[rank] += 1
        if self._trials[bucket] > MEMORY:
            self._trials[bucket] /= 2
            hits[:] = [count / 2 for count in hits]
        self._logs[bucket] = None


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a node stands in the automaton: state, how many newest tokens match, depth in the tree."""

    state: int
    length: int
    depth: int


@dataclass(slots=True)
class _Text:
    """A slot's text: the part that is indexed, and what came since and is read when somebody asks.

    Attributes:
        unread: tokens to index; rounds: what each round emitted, to learn from and index after them.
    """

    indexed: SuffixAutomaton
    unread: list[int]
    rounds: list[list[int]]


class NgramDrafter:
    """Trees out of the request's own text.

    One automaton per slot, one calibration for all requests. All work is on the host: a few microseconds per
    emitted token and per node, and none for texts that nobody asks about while speculation is off.
    """

    name = "ngram"
    taps: tuple[int, ...] = ()
    sources: tuple[str, ...] = ("ngram",)

    def __init__(self) -> None:
        self.calibration = Calibration()
        self._texts: dict[int, _Text] = {}

    def admit(self, slot: int, tokens: Tensor, features: Tensor, root: int) -> None:
        """Remember the prompt and the first emitted token; features are not looked at."""
        self._texts[slot] = _Text(SuffixAutomaton(), [*tokens.tolist(), root], [])

    def text(self, slot: int) -> SuffixAutomaton:
        """All that the slot's request has said, indexed."""
        text = self._texts[slot]
        for token in text.unread:
            text.indexed.append(token)
        for number, tokens in enumerate(text.rounds, start=1):
            self._read(text.indexed, tokens, learn=len(text.rounds) - number < LEARNED)
        text.unread, text.rounds = [], []
        return text.indexed

    def reuse(self, source: int, slot: int, rows: int) -> int:
        """All rows: the prompt is indexed anew by `admit`, without features."""
        return rows

    def propose(self, context: Context, shape: Shape) -> DraftTree:
        """Best-first trees; scores are estimated path log-probabilities.

        Nodes below `shape.node_floor` are left out, and so is the first level whose summed probability is
        below `shape.level_floor`, with all that lies deeper; then what is not worth `shape.prices`.
        """
        if shape.depth < 1 or shape.width < 1 or shape.nodes < 2:
            return root_only(context.roots)
        sketches = self.sketch(context, shape)
        if shape.prices:
            nodes = shape.worth(falling(sketches))
            sketches = [sketch.first(nodes) for sketch in sketches]
        if all(len(sketch.tokens) == 1 for sketch in sketches):
            return root_only(context.roots)
        return to_tree(sketches, context.roots.device)

    def sketch(self, context: Context, shape: Shape) -> list[Sketch]:
        """The trees of `propose` before prices are looked at, best first."""
        pairs = zip(context.slots.tolist(), context.roots.tolist(), strict=True)
        return [self._grow(self.text(slot), root, shape) for slot, root in pairs]

    def observe(self, context: Context, features: Tensor, verdict: Verdict) -> None:
        """Remember the emitted tokens, to learn from them which continuations held.

        A child of an accepted node is accepted when it is the next emitted token, so emitted tokens say all
        that `kept` says, and also what became of children that floors kept out of the tree: estimates of cut
        trees recover without a verified node.
        """
        rows = zip(context.slots.tolist(), verdict.counts.tolist(), verdict.tokens.tolist(), strict=True)
        for slot, count, tokens in rows:
            self._texts[slot].rounds.append(tokens[:count])

    def release(self, slot: int) -> None:
        """Forget the text; what was learned of acceptance stays."""
        self._texts.pop(slot, None)

    def _read(self, text: SuffixAutomaton, tokens: Sequence[int], *, learn: bool) -> None:
        """Append what a round emitted."""
        place = _Place(*text.match(), 0) if learn else None
        for token in tokens:
            place = self._learn(text, place, token)
            text.append(token)

    def _learn(self, text: SuffixAutomaton, place: _Place | None, token: int) -> _Place | None:
        """Note whether `token` was foreseen at `place`; returns where it leads, if it was."""
        if place is None or place.state == START:
            return None
        children, bucket = _children(text, place, RANKS)
        ahead = [child for child, _ in children]
        rank = ahead.index(token) if token in ahead else None
        self.calibration.note(bucket, rank)
        return None if rank is None else children[rank][1]

    def _grow(self, text: SuffixAutomaton, root: int, shape: Shape) -> Sketch:
        sketch = Sketch([root])
        floor = math.log(shape.node_floor) if shape.node_floor > 0 else -math.inf
        limit, width = min(shape.nodes, MAX_NODES), min(shape.width, RANKS)
        heap: list[tuple[float, int, int, int, _Place]] = []  # (-score, serial, parent, token, place)
        serial, node, place = 0, 0, _Place(*text.match(), 0)
        while True:
            if place.depth < shape.depth and place.state != START:
                children, bucket = _children(text, place, width)
                above = sketch.scores[node]
                for (token, there), log in zip(children, self.calibration.logs(bucket), strict=False):
                    if above + log >= floor:
                        heapq.heappush(heap, (-above - log, serial, node, token, there))
                        serial += 1
            if not heap or len(sketch.tokens) >= limit:
                break
            score, _, parent, token, place = heapq.heappop(heap)
            node = sketch.add(token, parent, -score)
        return _cut(sketch, shape.level_floor) if shape.level_floor > 0 else sketch


def _children(text: SuffixAutomaton, place: _Place, width: int) -> tuple[list[tuple[int, _Place]], int]:
    """Up to `width` continuations of a node, likeliest first, and the calibration bucket they belong to.

    Those of the longest match come first, then what only shorter matches have seen.
    """
    state, length, depth = place.state, place.length, place.depth
    if state == text.newest:  # drafted up to the end of the text: only shorter matches go on
        state = text.links[state]
        length = text.lengths[state]
    bucket = Calibration.bucket(length, depth, _unanimity(text.followers[state]))
    children: list[tuple[int, _Place]] = []
    taken: set[int] = set()
    while state > START and len(children) < width:
        moves = text.moves[state]
        for token in text.ranked(state):
            if token not in taken and len(children) < width:
                taken.add(token)
                children.append((token, _Place(moves[token], length + 1, depth + 1)))
        state = text.links[state]
        length = text.lengths[state]
    return children, bucket


def _unanimity(followers: dict[int, int]) -> int:
    most = max(followers.values())
    if len(followers) == 1:
        return SOLE if most == 1 else REPEATED
    return LEADING if 2 * most > sum(followers.values()) else MIXED


def _cut(sketch: Sketch, level_floor: float) -> Sketch:
    """Drop the first level that promises less than the floor, and all below it."""
    levels = [0.0] * (max(sketch.depths) + 1)
    for depth, score in zip(sketch.depths, sketch.scores, strict=True):
        levels[depth] += math.exp(score)
    end = next((depth for depth in range(1, len(levels)) if levels[depth] < level_floor), len(levels))
    if end == len(levels):
        return sketch
    cut, place = Sketch(sketch.tokens[:1]), {0: 0}
    for node, depth in enumerate(sketch.depths):
        if 0 < depth < end:
            place[node] = cut.add(sketch.tokens[node], place[sketch.parents[node]], sketch.scores[node])
    return cut
