"""The claims table: F1 to F5 from what was predicted and what the engine counted, refuted ones printed as such.

A claim that a run cannot judge (no head, too few cells) is undecided and says why. Knows rows and counters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.errors import RequestError
from specdec.surplus.association import affine_left_out, auroc, spearman
from specdec.surplus.claims import CellOutcomes, attainable, cell_fit, claim_f1, claim_f2, claim_f4, claim_f5
from specdec.surplus.draft import DraftRows
from specdec.surplus.entropy import Calibration, calibrate
from specdec.surplus.estimate import Estimate
from specdec.surplus.forecasts import Aligned, CellForecasts, cell_forecasts, probe_forecasts
from specdec.surplus.interval import Interval, bootstrap, resamples
from specdec.surplus.outcome import CellKey, Measured, cell_outcomes
from specdec.surplus.plan import Plan
from specdec.surplus.recorder import TreeShape
from specdec.surplus.values import Value, claim_row, clean, number, undecided

LEAST_CELLS = 40
NO_HEAD = "needs a head"


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything the claims rest on.

    Attributes:
        estimates: of the main tap set, by k.
        head: the head's teacher-forced rows, by k.
        aligned: the same where all depths exist.
        domain_of_row: int64 [T] of the captured rows.
        domains: names, of predictors and outcomes.
        measured: engine runs on outcome documents, by shape.
        tau: predicted tau by shape, with its interval over predictor documents.
        shapes: trees sampled on predictor documents.
        plan: budget.
    """

    estimates: Mapping[int, Estimate]
    head: Mapping[int, DraftRows]
    aligned: Aligned
    domain_of_row: Tensor
    domains: tuple[str, ...]
    measured: dict[str, Measured]
    tau: Mapping[str, Interval]
    shapes: Sequence[TreeShape]
    plan: Plan


def without_head() -> list[Value]:
    """The claims table of a plan report."""
    limits = {"F1": "<= -0.3", "F2": "R2 >= 0.8", "F3": ">= 0.5", "F4": "<= 0.1", "F5": "> 0"}
    return [undecided(name, limit, NO_HEAD) for name, limit in limits.items()]


def judge(evidence: Evidence) -> dict[str, Value | list[Value]]:
    """claims, prediction (one row per cell) and calibration of the report."""
    keys, outcomes = cell_outcomes(evidence.measured, evidence.plan.least_events)
    calibration, f5 = _calibration(evidence)
    cells, f2 = _cells(evidence, keys, outcomes)
    claims = [*_f1(evidence), *f2]
    note = "needs heads trained on six tap sets; this run has one"
    claims.append(undecided("F3 Kendall", ">= 0.5", note))
    claims += [*_f4(evidence), f5]
    return {"claims": claims, "prediction": cells, "calibration": calibration}


def _f1(evidence: Evidence) -> list[Value]:
    """Per context at k = 2, and the baselines that F1 has to beat."""
    probe, head = evidence.estimates[2].scores, evidence.head[2].scores
    place = torch.full((evidence.domain_of_row.shape[0],), -1, dtype=torch.int64)
    place[head.at] = torch.arange(head.at.shape[0])
    keep = place[probe.at] >= 0
    ours, theirs = probe.take(keep), head.take(place[probe.at][keep])
    given = torch.stack([theirs.spread_q, theirs.confidence], dim=1)
    draws = min(200, evidence.plan.draws)
    rows = [claim_row(c) for c in claim_f1(ours.gap, theirs.alpha, given, ours.doc, draws=draws)]
    rivals = {
        "draft confidence": theirs.confidence,
        "target entropy": theirs.entropy,
        "surplus S": ours.surplus,
    }
    told = [f"{name} {spearman(value, theirs.alpha):+.3f}" for name, value in rivals.items()]
    rows[0]["note"] = "Spearman of the rivals: " + ", ".join(told)
    return [*rows, _ex_ante(evidence)]


def _ex_ante(evidence: Evidence) -> Value:
    """What draft confidence alone knows about the text's next token: the bar for any ex-ante predictor."""
    rows = evidence.head[2]
    known = ~rows.log_ratio.isnan()
    scores, hit = rows.scores.take(known), (rows.rank[known] == 0).float()

    def area(index: Tensor) -> float:
        return auroc(scores.confidence[index], hit[index])

    found = bootstrap(scores.doc, area, draws=min(100, evidence.plan.draws), minimum=2)
    row = undecided("H0 draft confidence AUROC", "the bar to beat", "for the first draft token")
    return row | {"number": number(found), "verdict": "baseline"}


def _cells(
    evidence: Evidence, keys: Sequence[CellKey], outcomes: CellOutcomes
) -> tuple[list[Value], list[Value]]:
    """F2a and F2b over cells, and the cells themselves for the figure."""
    if not keys:
        return [], [undecided(n, "R2 >= 0.8", "no cell has enough draft tokens") for n in ("F2a", "F2b")]
    told = cell_forecasts(evidence.aligned, keys, evidence.shapes)
    probe, scale = probe_forecasts(
        evidence.estimates, evidence.aligned, evidence.domain_of_row, keys, evidence.shapes
    )
    rows = []
    for i, key in enumerate(keys):
        mine = outcomes.cell == i
        found = resamples(outcomes.doc[mine], draws=evidence.plan.draws, minimum=1).mean(
            outcomes.acceptance[mine]
        )
        rows.append(
            {
                "shape": key.shape,
                "domain": evidence.domains[key.domain],
                "depth": key.depth,
                "predicted": clean(float(told.ours[i])),
                "erfc": clean(float(told.erfc[i])),
                "probe": clean(float(probe[i])),
                "measured": number(found),
            }
        )
    return rows, _f2_claims(evidence, keys, outcomes, told, (probe, scale))


def _f2_claims(
    evidence: Evidence, keys: Sequence[CellKey], outcomes: CellOutcomes, told: CellForecasts,
    probe: tuple[Tensor, float],
) -> list[Value]:  # fmt: skip
    """Over the cells that have a forecast: some domain may lie among the outcomes alone."""
    known = told.ours.isfinite()
    outcomes, group = _subset(outcomes, known), torch.tensor([key.domain for key in keys])[known]
    rivals = {"draft confidence": told.confidence[known]}
    if torch.unique(group).numel() > 1:
        measured = outcomes.measured()
        rivals["entropy, affine"] = affine_left_out(told.entropy[known], measured, group)
        rivals["perplexity, affine"] = affine_left_out(told.crossed[known].exp(), measured, group)
    docs = evidence.aligned.doc
    claims = _f2("F2a", told.ours[known], outcomes, docs, rivals)
    guess, scale = probe[0][known], probe[1]
    good = guess.isfinite()
    narrow = {name: values[good] for name, values in rivals.items()}
    theirs = _f2("F2b", guess[good], _subset(outcomes, good), docs, narrow)
    theirs[0]["note"] += f"; scale {scale:.2f}"
    return claims + theirs


def _subset(outcomes: CellOutcomes, keep: Tensor) -> CellOutcomes:
    """Only the cells of a mask, renumbered."""
    new = torch.cumsum(keep.long(), 0) - 1
    rows = keep[outcomes.cell]
    return CellOutcomes(
        new[outcomes.cell[rows]], outcomes.doc[rows], outcomes.acceptance[rows], int(keep.sum())
    )


def _f2(
    name: str, predicted: Tensor, outcomes: CellOutcomes, docs: Tensor, rivals: Mapping[str, Tensor]
) -> list[Value]:
    def make() -> list[Value]:
        rows = [
            claim_row(c) for c in claim_f2(name, predicted, outcomes, docs, rivals, least_cells=LEAST_CELLS)
        ]
        fit = cell_fit(predicted, outcomes)
        rows[0]["note"] = (
            f"{outcomes.cells} cells; slope {fit.slope.value:.3f}, mean absolute error {fit.error.value:.3f}; "
            f"exact predictions would reach {attainable(outcomes):.2f}"
        )
        return rows

    return _or_undecided(make, f"{name} R2", ">= 0.8")


def _f4(evidence: Evidence) -> list[Value]:
    rows = []
    for shape, run in evidence.measured.items():
        strict = 0.05 if shape == "tree" else 0.03
        made = _or_undecided(
            lambda shape=shape, run=run, strict=strict: [  # type: ignore[misc]  # defaults bind the loop's values
                claim_row(claim_f4(shape, evidence.tau[shape], run.tau(), impressive=strict))
            ],
            f"F4 {shape} relative error",
            "<= 0.1",
        )
        rows += made
    return rows


def _calibration(evidence: Evidence) -> tuple[list[Value], Value]:
    """Calibration of the head per depth, and F5. Laws are kept of a sample of rows: `gap_tempered` is the gap of all
    rows less what the temperature of other documents saves on the sample."""
    rows, excess, residual, gaps = [], [], [], []
    for k, each in sorted(evidence.head.items()):
        log_p, log_q, doc = each.law
        fixed: Calibration = calibrate(log_p, log_q, half=_half(doc))
        drawn = resamples(each.scores.doc, draws=evidence.plan.draws, minimum=2)
        excess.append(drawn.mean(each.scores.spread_q - each.scores.entropy))
        gap = drawn.mean(each.scores.gap)
        residual.append(fixed.residual)
        gaps.append(gap.value)
        rows.append(
            {
                "depth": k,
                "ece": clean(fixed.error),
                "temperature": clean(fixed.temperature),
                "gap": number(gap),
                "gap_tempered": clean(gap.value - fixed.divergence + fixed.divergence_fixed),
                "excess_entropy": number(excess[-1]),
                "residual": clean(fixed.residual),
                "coverage": number(drawn.mean(each.coverage)),
            }
        )
    return rows, claim_row(claim_f5(excess, residual, gaps))


def _half(doc: Tensor) -> Tensor:
    """bool [n]: the rows of a random half of the documents that there are."""
    present, group = torch.unique(doc, return_inverse=True)
    order = torch.randperm(len(present), generator=torch.Generator().manual_seed(0))
    return order[group] % 2 == 0


def _or_undecided(make: Callable[[], list[Value]], name: str, threshold: str) -> list[Value]:
    """A claim that cannot be judged is a row of the table, not the end of the report."""
    try:
        return make()
    except RequestError as error:
        return [undecided(name, threshold, str(error))]
