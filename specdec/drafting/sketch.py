"""Sketches: trees under construction on the host, as lists; made into one batch of tensors at the end.

Knows nothing of who drafts. Building small trees with tensor operations would cost as much as searching for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdec.tree import DraftTree

WORD = 2**64 - 1


@dataclass(slots=True)
class Sketch:
    """One tree under construction; node 0 is the root.

    Attributes:
        scores: log-probability of the path to each node.
    """

    tokens: list[int]
    parents: list[int] = field(default_factory=lambda: [0])
    depths: list[int] = field(default_factory=lambda: [0])
    ancestors: list[int] = field(default_factory=lambda: [1])
    scores: list[float] = field(default_factory=lambda: [0.0])

    def add(self, token: int, parent: int, score: float) -> int:
        """Hang a node on `parent`; returns its index."""
        node = len(self.tokens)
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self.ancestors.append(self.ancestors[parent] | 1 << node)
        self.scores.append(score)
        return node

    def first(self, nodes: int) -> Sketch:
        """The first `nodes` nodes: of a tree that was grown best first, the best ones."""
        lists = (self.tokens, self.parents, self.depths, self.ancestors, self.scores)
        return Sketch(*(values[:nodes] for values in lists))  # type: ignore[arg-type]  # one type per list


def falling(sketches: Sequence[Sketch]) -> Tensor:
    """Path probabilities of the nodes beyond the roots of best-first sketches, float32 [B, C] padded with zeros."""
    most = max(len(sketch.scores) for sketch in sketches)
    rows = [
        [math.exp(s) for s in sketch.scores[1:]] + [0.0] * (most - len(sketch.scores)) for sketch in sketches
    ]
    return torch.tensor(rows)


def to_tree(sketches: Sequence[Sketch], device: torch.device) -> DraftTree:
    """One batch out of many sketches, padded as `tree.pad` does."""
    n = max(len(sketch.tokens) for sketch in sketches)
    extra = [n - len(sketch.tokens) for sketch in sketches]
    inert = [_signed(1 << node | 1) for node in range(n)]

    def column(values: list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    def padded(rows: list[list[int]], filler: int) -> Tensor:
        return column([row + [filler] * short for row, short in zip(rows, extra, strict=True)])

    scores = [sketch.scores + [-math.inf] * short for sketch, short in zip(sketches, extra, strict=True)]
    words = [[_signed(word) for word in sketch.ancestors] for sketch in sketches]
    return DraftTree(
        tokens=padded([sketch.tokens for sketch in sketches], 0),
        parents=padded([sketch.parents for sketch in sketches], 0),
        depths=padded([sketch.depths for sketch in sketches], 1),
        ancestors=column([row + inert[len(row) :] for row in words]),
        sizes=torch.tensor([n - short for short in extra], dtype=torch.int64, device=device),
        scores=torch.tensor(scores, dtype=torch.float32, device=device),
    )


def of_tree(tree: DraftTree) -> list[Sketch]:
    """The inverse of `to_tree`; trees without scores must be bare roots."""
    scores = torch.zeros_like(tree.tokens[:, :1], dtype=torch.float32) if tree.scores is None else tree.scores
    words = [[word & WORD for word in row] for row in tree.ancestors.tolist()]
    columns = (tree.tokens.tolist(), tree.parents.tolist(), tree.depths.tolist(), words, scores.tolist())
    rows = zip(*columns, tree.sizes.tolist(), strict=True)
    return [Sketch(*lists).first(size) for *lists, size in rows]


def _signed(word: int) -> int:
    """A 64-bit word as int64 reads it."""
    return word - (word >> 63 << 64)
