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
from specdec.surplus.draft import DraftRows, take
from specdec.surplus.estimate import TOPS, Estimate
from specdec.surplus.outcome import CellKey
from specdec.surplus.predict import DepthLaw, depth_law, erfc_link
from specdec.surplus.recorder import TreeShape
from specdec.surplus.rounds import Rounds, rounds_of


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

    def law(self) -> DepthLaw:
        """Depth law of a chain of one deterministic child per depth, over all contexts alike."""
        return depth_law(
            torch.stack([rows.scores.top[:, 0] for rows in self.depths], dim=1),
            torch.stack([(rows.rank == 0).float() for rows in self.depths], dim=1),
        )

    def rounds(self, shape: str, shapes: Sequence[TreeShape]) -> Rounds:
        """The engine's rounds of a shape along these texts; `shapes` are sampled trees, for "tree"."""
        return rounds_of(self.depths, shape, shapes)


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


@dataclass(frozen=True, slots=True)
class CellForecasts:
    """One prediction per cell, float64 [c].

    Attributes:
        ours: acceptance of the verifier in use, as the engine's rounds meet it (F2a); NaN where the predictors'
            text of this domain has no such round.
        erfc: mean erfc link of what they meet.
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
    """Per depth, each float64 [K]: means over what the engine's rounds meet there."""
    rounds = part.rounds(shape, shapes)
    found: dict[str, list[Tensor]] = {name: [] for name in CellForecasts.__slots__ if name != "ours"}
    for offered, rows in zip(rounds.offered.T, part.depths, strict=True):
        s, weight = rows.scores, rounds.start * offered
        columns = (erfc_link(s.gap), s.confidence, s.entropy, s.entropy + s.gap)
        for name, value in zip(found, columns, strict=True):
            found[name].append((weight * value.double()).sum() / weight.sum().clamp_min(1e-9))
    return {"ours": rounds.alpha} | {name: torch.stack(values) for name, values in found.items()}


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
    known = found.isfinite() & goals.isfinite()
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
