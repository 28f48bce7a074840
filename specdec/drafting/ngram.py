"""NgramDrafter: proposes what followed the same words earlier in the prompt or the output.

Needs no training and no features; knows nothing of the target. Per slot a suffix automaton indexes the text; trees
grow best first by estimated path probability. The estimates come from counts of how often continuations held
before, pooled over all requests of the drafter, so floors on the probability cut what does not pay.

    text      the cat sat . the cat ran . the cat | root = cat, match "the cat" (and ". the cat", ...)
    tree      cat -> ran -> .        what followed most often, the most recent first among equals
               `---> sat -> .        other continuations, then those of shorter matches
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdec.accept import Verdict
from specdec.drafting.automaton import START, SuffixAutomaton
from specdec.drafting.protocol import Context, Shape
from specdec.tree import MAX_NODES, DraftTree, root_only

RANKS = 6  # children considered per node at most
LENGTHS = (1, 2, 3, 4, 6, 9, 17)  # lower edges of the match length buckets
DEPTHS = (0, 1, 2, 4, 8)  # lower edges of the depth buckets
SOLE, REPEATED, SEVERAL = range(3)  # how unanimous earlier occurrences were: one, many alike, differing
PRIOR = (0.15, 0.3, 0.45, 0.55, 0.7, 0.8, 0.85)  # first child, by match length
PRIOR_LATER = (0.0, 0.25, 0.1, 0.06, 0.04, 0.03)  # later children, of the probability the first leaves
PRIOR_TRIALS = 8.0  # trials the prior counts for
MEMORY = 512.0  # trials after which counts are halved, so that estimates follow the traffic


def _buckets(edges: Sequence[int], top: int) -> list[int]:
    return [sum(value >= edge for edge in edges[1:]) for value in range(top + 1)]


_LENGTH_BUCKET, _DEPTH_BUCKET = _buckets(LENGTHS, LENGTHS[-1]), _buckets(DEPTHS, MAX_NODES)


class Calibration:
    """How often continuations held: by match length, depth and unanimity, for each rank among siblings.

    The ranks of one node exclude each other, so their probabilities sum to less than one.
    """

    def __init__(self) -> None:
        self._hits: list[list[float]] = []
        for length in range(len(LENGTHS)):
            prior = [PRIOR[length]] + [(1 - PRIOR[length]) * share for share in PRIOR_LATER[1:]]
            self._hits += [[p * PRIOR_TRIALS for p in prior] for _ in range(len(DEPTHS) * 3)]
        self._trials = [PRIOR_TRIALS] * len(self._hits)
        self._logs: list[list[float] | None] = [None] * len(self._hits)

    @staticmethod
    def bucket(length: int, depth: int, unanimity: int) -> int:
        """The bucket of a node whose `length` newest tokens matched, at `depth` below the root."""
        row = _LENGTH_BUCKET[min(length, LENGTHS[-1])] * len(DEPTHS) + _DEPTH_BUCKET[depth]
        return row * 3 + unanimity

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
    """Where a node stands in the automaton: a state, how many newest tokens it matched, depth below the root."""

    state: int
    length: int
    depth: int


@dataclass(slots=True)
class _Sketch:
    """One tree under construction, as lists; node 0 is the root."""

    tokens: list[int]
    parents: list[int] = field(default_factory=lambda: [0])
    depths: list[int] = field(default_factory=lambda: [0])
    ancestors: list[int] = field(default_factory=lambda: [1])
    scores: list[float] = field(default_factory=lambda: [0.0])

    def add(self, token: int, parent: int, score: float) -> int:
        node = len(self.tokens)
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self.ancestors.append(self.ancestors[parent] | 1 << node)
        self.scores.append(score)
        return node


class NgramDrafter:
    """Trees out of the request's own text.

    One automaton per slot, one calibration for all requests. All work is on the host: a few microseconds per
    emitted token and per node.
    """

    name = "ngram"
    taps: tuple[int, ...] = ()

    def __init__(self) -> None:
        self.calibration = Calibration()
        self._texts: dict[int, SuffixAutomaton] = {}

    def admit(self, slot: int, tokens: Tensor, features: Tensor, root: int) -> None:
        """Index the prompt and the first emitted token; features are not looked at."""
        text = self._texts[slot] = SuffixAutomaton()
        for token in tokens.tolist():
            text.append(token)
        text.append(root)

    def reuse(self, source: int, slot: int, rows: int) -> int:
        """All rows: the prompt is indexed anew by `admit`, without features."""
        return rows

    def propose(self, context: Context, shape: Shape) -> DraftTree:
        """Best-first trees; scores are estimated path log-probabilities.

        Nodes below `shape.node_floor` are left out, and so is the first level whose summed probability is below
        `shape.level_floor` with all that lies deeper.
        """
        if shape.depth < 1 or shape.width < 1 or shape.nodes < 2:
            return root_only(context.roots)
        pairs = zip(context.slots.tolist(), context.roots.tolist(), strict=True)
        sketches = [self._grow(self._texts[slot], root, shape) for slot, root in pairs]
        if all(len(sketch.tokens) == 1 for sketch in sketches):
            return root_only(context.roots)
        return _tensors(sketches, context.roots.device)

    def observe(self, context: Context, features: Tensor, verdict: Verdict) -> None:
        """Learn from the emitted tokens which continuations held, and append them.

        A child of an accepted node is accepted when it is the next emitted token, so emitted tokens say all that
        `kept` says, and also what became of children that floors kept out of the tree: estimates of cut trees
        recover without a verified node.
        """
        rows = zip(context.slots.tolist(), verdict.counts.tolist(), verdict.tokens.tolist(), strict=True)
        for slot, count, tokens in rows:
            text = self._texts[slot]
            place: _Place | None = _Place(*text.match(), 0)
            for token in tokens[:count]:
                place = self._learn(text, place, token)
                text.append(token)

    def release(self, slot: int) -> None:
        """Forget the text; what was learned of acceptance stays."""
        self._texts.pop(slot, None)

    def _learn(self, text: SuffixAutomaton, place: _Place | None, token: int) -> _Place | None:
        """Note whether `token` was foreseen at `place`; returns where it leads, if it was."""
        if place is None or place.state == START:
            return None
        children, bucket = _children(text, place, RANKS)
        if not children:
            return None
        ahead = [child for child, _ in children]
        rank = ahead.index(token) if token in ahead else None
        self.calibration.note(bucket, rank)
        return None if rank is None else children[rank][1]

    def _grow(self, text: SuffixAutomaton, root: int, shape: Shape) -> _Sketch:
        sketch = _Sketch([root])
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
    children: list[tuple[int, _Place]] = []
    taken: set[int] = set()
    longest: dict[int, int] = {}
    while state > START and len(children) < width:
        moves = text.moves[state]
        for token in text.ranked(state):
            if token not in taken and len(children) < width:
                taken.add(token)
                children.append((token, _Place(moves[token], length + 1, depth + 1)))
        if not longest:
            longest, matched = text.followers[state], length
        state = text.links[state]
        length = text.lengths[state]
    if not longest:
        return [], Calibration.bucket(1, depth, SEVERAL)
    unanimity = SEVERAL if len(longest) > 1 else SOLE if next(iter(longest.values())) == 1 else REPEATED
    return children, Calibration.bucket(matched, depth, unanimity)


def _cut(sketch: _Sketch, level_floor: float) -> _Sketch:
    """Drop the first level that promises less than the floor, and all below it."""
    levels = [0.0] * (max(sketch.depths) + 1)
    for depth, score in zip(sketch.depths, sketch.scores, strict=True):
        levels[depth] += math.exp(score)
    end = next((depth for depth, promise in enumerate(levels) if promise < level_floor and depth > 0), len(levels))
    if end == len(levels):
        return sketch
    cut, place = _Sketch(sketch.tokens[:1]), {0: 0}
    for node, depth in enumerate(sketch.depths):
        if 0 < depth < end:
            place[node] = cut.add(sketch.tokens[node], place[sketch.parents[node]], sketch.scores[node])
    return cut


def _tensors(sketches: Sequence[_Sketch], device: torch.device) -> DraftTree:
    """One batch out of many sketches, padded as `tree.pad` does; made from lists because building it with tensor
    operations would cost as much as the search."""
    n = max(len(sketch.tokens) for sketch in sketches)
    inert = [_signed(1 << node | 1) for node in range(n)]

    def column(values: list[list[int]], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    sizes = [len(sketch.tokens) for sketch in sketches]
    scores = [sketch.scores + [-math.inf] * (n - size) for sketch, size in zip(sketches, sizes, strict=True)]
    words = [[_signed(word) for word in sketch.ancestors] for sketch in sketches]
    return DraftTree(
        tokens=column([sketch.tokens + [0] * (n - size) for sketch, size in zip(sketches, sizes, strict=True)]),
        parents=column([sketch.parents + [0] * (n - size) for sketch, size in zip(sketches, sizes, strict=True)]),
        depths=column([sketch.depths + [1] * (n - size) for sketch, size in zip(sketches, sizes, strict=True)]),
        ancestors=column([word + inert[size:] for word, size in zip(words, sizes, strict=True)]),
        sizes=torch.tensor(sizes, dtype=torch.int64, device=device),
        scores=torch.tensor(scores, dtype=torch.float32, device=device),
    )


def _signed(word: int) -> int:
    """A 64-bit word as int64 reads it."""
    return word - (word >> 63 << 64)
