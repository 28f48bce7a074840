"""Cells: the rows of an estimate cut by domain, position and target entropy, each with document intervals.

Knows rows, not probes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor

from specdec.errors import RequestError
from specdec.surplus.estimate import Estimate
from specdec.surplus.interval import Interval, resamples

POSITION_EDGES = (64, 256)
"""Positions below 64, 64 to 255, from 256 on."""
ENTROPY_EDGES = (0.5, 2.0)
"""Target entropy in nats: near-certain, open, wide open."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the table; informations in nats, with 95% document intervals.

    Attributes:
        key: factor -> level, for instance {"taps": "8+15+25", "depth": "2", "domain": "math"}.
        surplus: S_k, including the seeds' spread.
        gap: Delta_k, the control-free headline, including the seeds' spread.
        ceiling: C_k = S_k + Delta_k.
        captured: S_k / C_k, a ratio of means.
        alpha: E sum min(p, q).
        top: E of the p-mass of the top-m of q, m as in `estimate.TOPS`.
        entropy: E H(p_k).
        control_spread: systematic error of S and C from the choice of control.
    """

    key: Mapping[str, str]
    surplus: Interval
    gap: Interval
    ceiling: Interval
    captured: Interval
    alpha: Interval
    top: tuple[Interval, ...]
    entropy: Interval
    control_spread: float


def bin_names(values: Tensor, edges: Sequence[float], unit: str) -> list[str]:
    """Name the bin of each value.

    >>> bin_names(torch.tensor([0.1, 0.5, 9.0]), (0.5, 2.0), "nats")
    ['< 0.5 nats', '0.5 to 2.0 nats', '>= 2.0 nats']
    """
    names = [f"< {edges[0]} {unit}"]
    names += [f"{low} to {high} {unit}" for low, high in pairwise(edges)]
    names.append(f">= {edges[-1]} {unit}")
    index = torch.bucketize(values, torch.tensor(edges, dtype=values.dtype), right=True)
    return [names[i] for i in index.tolist()]


def make_cell(
    estimate: Estimate, key: Mapping[str, str], keep: Tensor | None = None, draws: int = 1000
) -> Cell:
    """The cell of the rows `keep` (bool or index; None is all).

    Raises:
        RequestError: too few documents for an interval; the message says how many are needed.
    """
    rows = estimate.scores if keep is None else estimate.scores.take(keep)
    drawn = resamples(rows.doc, draws=draws)
    total = rows.surplus + rows.gap
    return Cell(
        key=dict(key),
        surplus=drawn.mean(rows.surplus).widen(estimate.seed_spread),
        gap=drawn.mean(rows.gap).widen(estimate.seed_spread),
        ceiling=drawn.mean(total),
        captured=drawn.ratio(rows.surplus, total),
        alpha=drawn.mean(rows.alpha),
        top=tuple(drawn.mean(rows.top[:, i]) for i in range(rows.top.shape[1])),
        entropy=drawn.mean(rows.entropy),
        control_spread=estimate.control_spread,
    )


@dataclass(frozen=True, slots=True)
class Table:
    """Cells, and the keys left out because too few documents reach them."""

    cells: tuple[Cell, ...]
    thin: tuple[Mapping[str, str], ...]


def slice_cells(
    estimate: Estimate, base: Mapping[str, str], factors: Mapping[str, Sequence[str]], draws: int = 1000
) -> Table:
    """Every combination of the factors' levels, plus nothing else: call it once per view wanted.

    Args:
        estimate: one depth.
        base: key entries shared by all cells (tap set, depth).
        factors: per factor the level of each row, n names; empty gives the single overall cell.
    """
    codes, levels = [], []
    for names in factors.values():
        known = sorted(set(names))
        levels.append(known)
        codes.append(torch.tensor([known.index(name) for name in names]))
    cells, thin = [], []
    for combination in product(*(range(len(known)) for known in levels)):
        keep = torch.ones(estimate.scores.at.shape[0], dtype=torch.bool)
        for code, wanted in zip(codes, combination, strict=True):
            keep &= code == wanted
        key = dict(base) | {
            name: levels[i][level] for i, (name, level) in enumerate(zip(factors, combination, strict=True))
        }
        try:
            cells.append(make_cell(estimate, key, keep, draws))
        except RequestError:
            thin.append(key)
    return Table(tuple(cells), tuple(thin))
