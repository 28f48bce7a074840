"""Forecasts of acceptance and tau from predictor documents: the depth law, the links, and the baselines to beat.

Everything is computed from teacher-forced rows (of the head, or of a probe) before the outcome documents are decoded.
Knows rows, not engines. Dimension legend: n contexts with all K depths, R children ranks, c cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.errors import RequestError
from specdec.surplus.draft import RANKS, DraftRows, take
from specdec.surplus.estimate import TOPS, Estimate
from specdec.surplus.outcome import CellKey
from specdec.surplus.predict import DepthLaw, depth_law, erfc_link, ranked_tree_tau
from specdec.surplus.recorder import TreeShape


@dataclass(frozen=True, slots=True)
class Aligned:
    """The head's rows of contexts that hold all K depths; row i of every depth is the same context.

    Attributes:
        depths: one `DraftRows` per draft depth 1 .. K.
        domain: int64 [n].
    """

    depths: tuple[DraftRows, ...]
    domain: Tensor

    def where(self, keep: Tensor) -> Aligned:
        """Contexts picked by a mask [n]."""
        return Aligned(tuple(take(rows, keep) for rows in self.depths), self.domain[keep])

    @property
    def doc(self) -> Tensor:
        """int64 [n]."""
        return self.depths[0].scores.doc

    def law(self, shape: str) -> DepthLaw:
        """Depth law of a chain: one deterministic child per depth, or sampled drafts under block verification."""
        if shape != "sampled chain":
            return depth_law(
                torch.stack([rows.scores.top[:, 0] for rows in self.depths], dim=1),
                torch.stack([(rows.rank == 0).float() for rows in self.depths], dim=1),
            )
        reach = self.block_survival().mean(0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), reach[:-1]])
        forced = torch.stack([rows.scores.alpha.double().mean() for rows in self.depths])
        return DepthLaw(forced, reach / before.clamp_min(1e-300), reach)

    def block_survival(self) -> Tensor:
        """How much of a block of sampled drafts survives on the target's own text, float64 [n, K].

        Block verification (arXiv 2403.10444) accepts w_j = min(1, w_{j-1} p/q) of a path drawn from Q. Weighted back
        to the target's law that is the running minimum of the cumulative ratio:
        P(L >= j) = E_P min(1, min_{i<=j} Q(x_1..x_i) / P(x_1..x_i)), never below the token rule's product of minima.
        """
        ratio = torch.stack([rows.log_ratio.double() for rows in self.depths], dim=1)
        floor = ratio.cumsum(1).nan_to_num(float("-inf"), neginf=float("-inf")).cummin(1).values
        return floor.clamp_max(0).exp()

    def survivors(self, width: int) -> list[Tensor]:
        """float64 [n] per depth: did the text so far stay among the best `width` of the head?"""
        alive, kept = torch.ones(len(self.domain), dtype=torch.float64), []
        for rows in self.depths:
            kept.append(alive)
            alive = alive * (rows.rank < width).double()
        return kept

    def rank_masses(self, width: int = RANKS) -> Tensor:
        """Mean mass of rank r at depth j among contexts that survive in a tree of that width: [K, R]."""
        kept = self.survivors(width)
        means = [
            (alive[:, None] * rows.masses.double()).sum(0) / alive.sum().clamp_min(1e-9)
            for alive, rows in zip(kept, self.depths, strict=True)
        ]
        return torch.stack(means)


def align(rows: Mapping[int, DraftRows], domain_of_row: Tensor) -> Aligned:
    """Keep the contexts that the deepest depth has, with a known token at every depth.

    Args:
        rows: by k.
        domain_of_row: int64 [T], domain of each captured row.

    Raises:
        RequestError: no context reaches the deepest depth.
    """
    deepest = rows[max(rows)]
    at = deepest.scores.at[~deepest.log_ratio.isnan()]
    if not at.numel():
        raise RequestError(
            "no text is long enough", field="draft depth", value=max(rows) - 1, remedy="Longer answers."
        )
    depths = []
    for k in sorted(rows):
        place = torch.full((int(domain_of_row.shape[0]),), -1, dtype=torch.int64)
        place[rows[k].scores.at] = torch.arange(rows[k].scores.at.shape[0])
        depths.append(take(rows[k], place[at]))
    return Aligned(tuple(depths), domain_of_row[at])


def tree_tau_of(aligned: Aligned, shapes: Sequence[TreeShape]) -> float:
    """Mean over sampled tree shapes of their tau under the measured rank masses.

    The shapes come from predictor documents: which nodes a tree has depends on the head's own confidence alone.
    """
    masses = _masses(aligned, shapes)
    return sum(ranked_tree_tau(s.parents, s.ranks, masses) for s in shapes) / max(1, len(shapes))


def tree_reach(aligned: Aligned, shapes: Sequence[TreeShape]) -> Tensor:
    """P(L >= j) of the sampled trees under the measured rank masses, float64 [K + 1], entry 0 the root's 1."""
    masses, total = _masses(aligned, shapes), torch.zeros(len(aligned.depths) + 1, dtype=torch.float64)
    for shape in shapes:
        reach, depth = [1.0], [0]
        for node in range(1, len(shape.parents)):
            above = shape.parents[node]
            depth.append(depth[above] + 1)
            reach.append(reach[above] * float(masses[depth[node] - 1, shape.ranks[node]]))
        total.index_add_(0, torch.tensor(depth), torch.tensor(reach, dtype=torch.float64))
    return total / max(1, len(shapes))


def _masses(aligned: Aligned, shapes: Sequence[TreeShape]) -> Tensor:
    """Rank masses, padded with zeros where a tree is wider than what was measured."""
    width = max((max(shape.ranks) for shape in shapes), default=0) + 1
    masses = aligned.rank_masses(width)
    return torch.nn.functional.pad(masses, (0, max(0, width - masses.shape[1])))


@dataclass(frozen=True, slots=True)
class CellForecasts:
    """One prediction per cell, float64 [c].

    Attributes:
        ours: acceptance of the verifier in use, survivor-corrected (F2a).
        erfc: mean erfc link among survivors.
        confidence, entropy, crossed: the head's mean max q, the target's mean entropy, mean cross-entropy: raw
            baselines, the last two still to be fitted.
    """

    ours: Tensor
    erfc: Tensor
    confidence: Tensor
    entropy: Tensor
    crossed: Tensor


def cell_forecasts(aligned: Aligned, keys: Sequence[CellKey], shapes: Sequence[TreeShape]) -> CellForecasts:
    """Predict every cell from predictor contexts of its domain.

    Args:
        shapes: sampled trees of predictor documents, for the tree's runs.
    """
    columns: dict[str, list[float]] = {name: [] for name in CellForecasts.__slots__}
    known: dict[tuple[str, int], dict[str, Tensor]] = {}
    for key in keys:
        group = (key.shape, key.domain)
        if group not in known:
            known[group] = _group(aligned.where(aligned.domain == key.domain), key.shape, shapes)
        for name in columns:
            columns[name].append(float(known[group][name][key.depth - 1]))
    return CellForecasts(**{name: torch.tensor(v, dtype=torch.float64) for name, v in columns.items()})


def _group(part: Aligned, shape: str, shapes: Sequence[TreeShape]) -> dict[str, Tensor]:
    """Per depth, each float64 [K]: means over the contexts that survive so far."""
    alive = _alive(part, shape, shapes)
    found: dict[str, list[Tensor]] = {name: [] for name in CellForecasts.__slots__}
    for weight, rows in zip(alive, part.depths, strict=True):
        s = rows.scores
        columns = (rows.masses[:, 0], erfc_link(s.gap), s.confidence, s.entropy, s.entropy + s.gap)
        for name, value in zip(found, columns, strict=True):
            found[name].append((weight * value.double()).sum() / weight.sum().clamp_min(1e-9))
    means = {name: torch.stack(values) for name, values in found.items()}
    if shape == "tree":
        reach = tree_reach(part, shapes)
        means["ours"] = reach[1:] / reach[:-1].clamp_min(1e-9)
    if shape == "sampled chain":
        means["ours"] = part.law(shape).alpha
    return means


def _alive(part: Aligned, shape: str, shapes: Sequence[TreeShape]) -> list[Tensor]:
    if shape == "sampled chain":
        return [torch.ones(len(part.domain), dtype=torch.float64), *part.block_survival().T[:-1]]
    if shape == "tree":
        return part.survivors(max((max(s.ranks) for s in shapes), default=0) + 1)
    return part.survivors(1)


def probe_forecasts(
    estimates: Mapping[int, Estimate],
    aligned: Aligned,
    domain_of_row: Tensor,
    keys: Sequence[CellKey],
    shapes: Sequence[TreeShape],
) -> tuple[Tensor, float]:
    """F2b: the probe's own acceptance per cell times one scale, fitted on predictor documents for all cells alike.

    Acceptance of a chain is A_1, of a tree A_m at most its width, of sampled drafts the erfc link; the scale is what
    the head makes of such promises on predictor documents.

    Returns:
        (predictions [c], NaN where the probe has no such depth; the scale).
    """
    width = max((max(s.ranks) for s in shapes), default=0) + 1
    base = [_promise(estimates, key, width, domain_of_row) for key in keys]
    goals = cell_forecasts(aligned, keys, shapes).ours
    found = torch.tensor(base, dtype=torch.float64)
    known = found.isfinite()
    square = float(found[known].square().sum())
    scale = float((found[known] * goals[known]).sum()) / square if square > 0 else float("nan")
    return scale * found, scale


def _promise(estimates: Mapping[int, Estimate], key: CellKey, width: int, domain_of_row: Tensor) -> float:
    if key.depth + 1 not in estimates:
        return float("nan")
    s = estimates[key.depth + 1].scores
    keep = domain_of_row[s.at] == key.domain
    if key.shape == "sampled chain":
        return float(erfc_link(s.gap[keep]).mean())
    children = width if key.shape == "tree" else 1
    column = max(i for i, m in enumerate(TOPS) if m <= children)
    return float(s.top[keep, column].mean())
