"""Rounds that the engine would have along text the target wrote: where they start, how far they get.

Two selection effects separate the engine's counters from means over all text. Survivors: depth j is
only met where the drafts before it were right. Starts: a round begins after the last one's bonus token, so a stretch
that was drafted well is met once and every failure is met again. Both follow from the text itself, since the engine's
output is the target's own law whatever was drafted: a round at t that keeps l drafts is followed by one at t + l + 1.

    written     x0  x1  x2  x3  x4  x5        drafts right after x1: x2, x3; wrong at x4, which is the bonus
    round       x1: x2 x3 | x4: ...           the rows of x2 and x3 start no round

Nothing is fitted. Knows rows of a head and shapes of trees; no engine. Dimension legend: n contexts, K depths, R ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.surplus.draft import RANKS, DraftRows
from specdec.surplus.recorder import TreeShape


@dataclass(frozen=True, slots=True)
class Rounds:
    """What rounds of one shape meet at each context, float64.

    Attributes:
        start: [n], expected rounds that start here.
        offered: [n, K], chance that a round here reaches depth j - 1 and is offered depth j.
        won: [n, K], and accepts there: the target's mass on what is offered, not the token that came.
    """

    start: Tensor
    offered: Tensor
    won: Tensor

    @property
    def alpha(self) -> Tensor:
        """alpha(1 .. K) as the engine counts it, [K]; NaN where nothing is offered."""
        return (self.start @ self.won) / (self.start @ self.offered)

    @property
    def tokens(self) -> Tensor:
        """Expected tokens of the rounds that start at each context, bonus included, [n]."""
        return self.start * (1 + self.won.sum(1))

    @property
    def tau(self) -> float:
        """Tokens per round, bonus included."""
        return float(self.tokens.sum() / self.start.sum())


def deterministic_chain(depths: Sequence[DraftRows]) -> tuple[Tensor, Tensor, Tensor]:
    """(survival [n, K], offered, won) of one child per depth; survival is along the token that came."""
    right = torch.stack([(rows.rank == 0).double() for rows in depths], dim=1)
    survival = right.cumprod(1)
    offered = torch.cat([torch.ones_like(survival[:, :1]), survival[:, :-1]], dim=1)
    return survival, offered, offered * torch.stack([rows.masses[:, 0].double() for rows in depths], dim=1)


def sampled_chain(depths: Sequence[DraftRows]) -> tuple[Tensor, Tensor, Tensor]:
    """The same of a path drawn from Q under block verification.

    Block verification (arXiv 2403.10444) accepts w_j = min(1, w_{j-1} p/q) of a path drawn from Q. Given the text that
    came out, whose law is P, that is the running minimum of the cumulative ratio:
    P(L >= j | x) = min(1, min_{i<=j} Q(x_1..x_i) / P(x_1..x_i)), never below the token rule's product of minima.
    """
    ratio = torch.stack([rows.log_ratio.double() for rows in depths], dim=1)
    floor = ratio.cumsum(1).nan_to_num(float("-inf"), neginf=float("-inf")).cummin(1).values
    survival = floor.clamp_max(0).exp()
    return survival, torch.cat([torch.ones_like(survival[:, :1]), survival[:, :-1]], dim=1), survival


def tree(depths: Sequence[DraftRows], shapes: Sequence[TreeShape]) -> tuple[Tensor, Tensor, Tensor]:
    """The same of top-m trees: a path of ranks survives in those of the sampled shapes that hold it.

    Which shape meets which context is taken as independent (Sequoia's positional assumption).
    """
    nodes, inner, kids = _paths(shapes)
    ranks = torch.stack([rows.rank for rows in depths], dim=1).tolist()
    masses = torch.stack([rows.masses.double() for rows in depths], dim=1)
    n, k = masses.shape[:2]
    survival, offered = torch.zeros(n, k, dtype=torch.float64), torch.zeros(n, k, dtype=torch.float64)
    weights = torch.zeros(n, k, RANKS, dtype=torch.float64)
    for i, path in enumerate(ranks):
        for j in range(k):
            above = tuple(path[:j])
            if above not in inner:
                break
            offered[i, j], weights[i, j] = inner[above], kids[above]
            survival[i, j] = nodes.get((*above, path[j]), 0.0)
    return survival, offered, (weights * masses).sum(-1)


def _paths(
    shapes: Sequence[TreeShape],
) -> tuple[dict[tuple[int, ...], float], dict[tuple[int, ...], float], dict[tuple[int, ...], Tensor]]:
    """Share of shapes that hold each path of ranks; that draft below it; and each child's share, [RANKS]."""
    nodes: Counter[tuple[int, ...]] = Counter()
    inner: Counter[tuple[int, ...]] = Counter()
    for shape in shapes:
        paths: list[tuple[int, ...]] = [()]
        for node in range(1, len(shape.parents)):
            paths.append((*paths[shape.parents[node]], shape.ranks[node]))
        nodes.update(paths)
        inner.update({path[:-1] for path in paths[1:]})
    kids = {path: torch.zeros(RANKS, dtype=torch.float64) for path in inner}
    count = len(shapes)
    for path, times in nodes.items():
        if path and path[-1] < RANKS:
            kids[path[:-1]][path[-1]] = times / count
    return (
        {path: times / count for path, times in nodes.items()},
        {path: times / count for path, times in inner.items()},
        kids,
    )


def starts(doc: Tensor, survival: Tensor) -> Tensor:
    """Expected rounds that start at each context, float64 [n].

    Args:
        doc: int64 [n], contexts of one document in order and without holes.
        survival: float64 [n, K], chance that the first j drafts of a round here are kept, given the text.

    >>> starts(torch.zeros(4, dtype=torch.int64), torch.tensor([[1.0], [0.0], [0.0], [0.0]])).tolist()
    [1.0, 0.0, 1.0, 1.0]
    """
    n, k = survival.shape
    ends = torch.cat([survival, torch.zeros(n, 1, dtype=survival.dtype)], dim=1)
    stops = torch.cat([1 - ends[:, :1], ends[:, :-1] - ends[:, 1:]], dim=1).tolist()  # keeps exactly l
    visits = [0.0] * n
    first = torch.cat([torch.ones(1, dtype=torch.bool), doc.diff() != 0]).tolist()
    names = doc.tolist()
    for i in range(n):
        if first[i]:
            visits[i] = 1.0
        if visits[i] == 0.0:
            continue
        for kept, chance in enumerate(stops[i][: k + 1]):
            after = i + kept + 1
            if chance and after < n and names[after] == names[i]:
                visits[after] += visits[i] * chance
    return torch.tensor(visits, dtype=torch.float64)


def rounds_of(depths: Sequence[DraftRows], shape: str, shapes: Sequence[TreeShape]) -> Rounds:
    """Rounds of "chain", "sampled chain" or "tree" along the contexts of `depths`."""
    if shape == "tree":
        survival, offered, won = tree(depths, shapes)
    elif shape == "sampled chain":
        survival, offered, won = sampled_chain(depths)
    else:
        survival, offered, won = deterministic_chain(depths)
    return Rounds(starts(depths[0].scores.doc, survival), offered, won)
