"""The falsifiable claims F1 to F5: a number, an interval, a threshold and an honest verdict.

A claim holds when its whole interval lies on the right side of the threshold, fails when it lies on the wrong
side, and is undecided in between. Circularity rule: a predictor never comes from the (p, q) pair whose
acceptance it predicts; cell predictions never share documents with their outcomes, and `require_disjoint`
refuses when they do. Knows vectors only. Dimension legend: n contexts, c cells, K depths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from specdec.errors import RequestError
from specdec.surplus.association import (
    kendall,
    mean_absolute_error,
    partial_spearman,
    r_squared,
    slope,
    spearman,
)
from specdec.surplus.interval import Interval, Resamples, bootstrap, resamples


class Verdict(Enum):
    """What the numbers say."""

    HOLDS = "holds"
    FAILS = "fails"
    UNDECIDED = "undecided"


@dataclass(frozen=True, slots=True)
class Claim:
    """One row of the claims table.

    Attributes:
        name: for instance "F1 raw".
        value: the statistic.
        interval: its 95% document interval.
        threshold: the limit, as text ("<= -0.3").
        verdict: by the whole interval.
        impressive: the value also passes the stricter mark.
    """

    name: str
    value: float
    interval: Interval
    threshold: str
    verdict: Verdict
    impressive: bool = False


def at_most(name: str, found: Interval, limit: float, impressive: float | None = None) -> Claim:
    """The claim that a statistic is at most `limit`."""
    verdict = _verdict(found.high <= limit, found.low > limit)
    strict = impressive is not None and found.value <= impressive
    return Claim(name, found.value, found, f"<= {limit:g}", verdict, strict)


def at_least(name: str, found: Interval, limit: float, impressive: float | None = None) -> Claim:
    """The claim that a statistic is at least `limit`."""
    verdict = _verdict(found.low >= limit, found.high < limit)
    strict = impressive is not None and found.value >= impressive
    return Claim(name, found.value, found, f">= {limit:g}", verdict, strict)


def _verdict(holds: bool, fails: bool) -> Verdict:
    return Verdict.HOLDS if holds else Verdict.FAILS if fails else Verdict.UNDECIDED


def require_disjoint(predictor_docs: Tensor, outcome_docs: Tensor) -> None:
    """Refuse predictors and outcomes that share a document.

    Raises:
        RequestError: naming how many are shared.
    """
    shared = int(torch.isin(torch.unique(predictor_docs), torch.unique(outcome_docs)).sum())
    if shared:
        raise RequestError(
            "predictors and outcomes share documents",
            field="documents",
            value=f"{shared} shared",
            allowed="0 shared",
            remedy="Split with folds.split_roles",
        )


def claim_f1(
    gap: Tensor, acceptance: Tensor, given: Tensor, doc: Tensor, *, draws: int = 200
) -> tuple[Claim, Claim]:
    """F1: the probe's gap d(c) predicts an independent head's acceptance per context, raw and partial.

    Args:
        gap: [n] of a probe that is not the draft.
        acceptance: [n] of the head.
        given: [n, 2], H(q) and max q of the head.
        doc: int64 [n].
    """
    raw = bootstrap(doc, lambda rows: spearman(gap[rows], acceptance[rows]), draws=draws)
    part = bootstrap(
        doc, lambda rows: partial_spearman(gap[rows], acceptance[rows], given[rows]), draws=draws
    )
    partial = Claim(
        "F1 partial",
        part.value,
        part,
        "< 0, interval without 0",
        _verdict(part.high < 0, part.high >= 0),
        part.value <= -0.35,
    )
    return at_most("F1 raw", raw, -0.3, -0.7), partial


@dataclass(frozen=True, slots=True)
class CellOutcomes:
    """Measured acceptance, by row, with the cell of each row.

    Attributes:
        cell: int64 [n], 0 .. c - 1.
        doc: int64 [n], outcome documents.
        acceptance: [n], engine counters (0/1) or expected acceptance.
        cells: c.
    """

    cell: Tensor
    doc: Tensor
    acceptance: Tensor
    cells: int

    def measured(self) -> Tensor:
        """Mean acceptance of each cell, float64 [c]."""
        return self._means(torch.ones(1, 1, dtype=torch.float64), torch.zeros_like(self.doc))[0]

    def draws(self, drawn: Resamples) -> Tensor:
        """Mean acceptance of each cell in each document resample, [B, c]; NaN where a cell is empty."""
        return self._means(drawn.weights, drawn.group)

    def _means(self, weights: Tensor, group: Tensor) -> Tensor:
        size = weights.shape[1] * self.cells
        slot = group * self.cells + self.cell
        total = torch.zeros(size, dtype=torch.float64).index_add_(0, slot, self.acceptance.double())
        count = torch.zeros(size, dtype=torch.float64).index_add_(0, slot, torch.ones_like(total[slot]))
        shape = (weights.shape[1], self.cells)
        return (weights @ total.view(shape)) / (weights @ count.view(shape))


@dataclass(frozen=True, slots=True)
class CellFit:
    """How a prediction of cells does: intervals over outcome documents."""

    r_squared: Interval
    slope: Interval
    error: Interval


def cell_fit(predicted: Tensor, outcomes: CellOutcomes, *, draws: int = 500, seed: int = 0) -> CellFit:
    """R^2 (nothing fitted), slope and mean absolute error of predictions [c] against measured cells."""
    drawn = resamples(outcomes.doc, draws=draws, seed=seed)
    samples, whole = outcomes.draws(drawn), outcomes.measured()
    return CellFit(
        *(_over(drawn, f, predicted, samples, whole) for f in (r_squared, slope, mean_absolute_error))
    )


def _over(
    drawn: Resamples,
    statistic: Callable[[Tensor, Tensor], float],
    predicted: Tensor,
    samples: Tensor,
    whole: Tensor,
) -> Interval:
    values = []
    for row in samples:
        known = ~row.isnan()
        values.append(statistic(predicted[known], row[known]))
    low, high = torch.tensor(values, dtype=torch.float64).nanquantile(
        torch.tensor([0.025, 0.975], dtype=torch.float64)
    )
    value = statistic(predicted, whole)
    return Interval(value, float(low), float(high), drawn.group.shape[0], drawn.documents)


def attainable(outcomes: CellOutcomes, *, draws: int = 500, seed: int = 0) -> float:
    """R^2 that exact predictions would reach: 1 minus the cells' sampling variance over their spread."""
    samples, whole = outcomes.draws(resamples(outcomes.doc, draws=draws, seed=seed)), outcomes.measured()
    noise = (samples - samples.nanmean(0)).square().nanmean()
    return 1 - float(noise / whole.var(unbiased=False))


def claim_f2(
    name: str,
    predicted: Tensor,
    outcomes: CellOutcomes,
    predictor_docs: Tensor,
    baselines: Mapping[str, Tensor],
    *,
    least_cells: int = 40,
) -> tuple[Claim, ...]:
    """F2: cells' acceptance from information, R^2 >= 0.8 and above every baseline (paired by document
    resample).

    Args:
        name: "F2a" (head's teacher-forced gap, no fitted parameter) or "F2b" (probe, one scale).
        predicted: [c].
        predictor_docs: documents the prediction came from.
        baselines: name -> predictions [c], already left-one-domain-out where fitted.

    Raises:
        RequestError: fewer cells than `least_cells`, or shared documents.
    """
    require_disjoint(predictor_docs, outcomes.doc)
    if outcomes.cells < least_cells:
        raise RequestError(f"too few cells: {least_cells} are needed", field="cells", value=outcomes.cells)
    found = cell_fit(predicted, outcomes)
    claims = [at_least(f"{name} R2", found.r_squared, 0.8, 0.95)]
    drawn = resamples(outcomes.doc, draws=500)
    samples, whole = outcomes.draws(drawn), outcomes.measured()
    for rival, guess in baselines.items():

        def lead(ours: Tensor, measured: Tensor, guess: Tensor = guess) -> float:
            return r_squared(ours, measured) - r_squared(guess, measured)

        margin = _over(drawn, lead, predicted, samples[~samples.isnan().any(1)], whole)
        claims.append(at_least(f"{name} over {rival}", margin, 0.0))
    return tuple(claims)


def claim_f3(gaps: Tensor, lengths: Tensor, *, least: int = 6) -> Claim:
    """F3: tap sets ranked by probe gap order trained heads by accepted length.

    Kendall of (-gap, length) >= 0.5. The tap sets are the sample, so the interval is over resampled documents
    of both sides.

    Args:
        gaps: [B + 1, c] probe gap of each tap set; row 0 on all documents, the rest on resamples.
        lengths: [B + 1, c] accepted length of the trained heads, likewise.

    Raises:
        RequestError: fewer than six tap sets.
    """
    if gaps.shape[1] < least:
        raise RequestError(
            f"a ranking needs {least} tap sets", field="tap sets", value=gaps.shape[1], allowed=f">= {least}"
        )
    taus = torch.tensor([kendall(-g, tau) for g, tau in zip(gaps, lengths, strict=True)], dtype=torch.float64)
    spread = taus[1:] if taus.shape[0] > 1 else taus
    low, high = spread.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    interval = Interval(float(taus[0]), low, high, gaps.shape[1], gaps.shape[1])
    first = bool(gaps[0].argmin() == lengths[0].argmax())
    claim = at_least("F3 Kendall", interval, 0.5, 0.8)
    return Claim(
        claim.name, claim.value, interval, claim.threshold, claim.verdict, claim.impressive and first
    )


def claim_f4(name: str, predicted: Interval, measured: Interval, *, impressive: float) -> Claim:
    """F4: predicted tau within 10% of the engine's counters.

    Both rest on documents of their own, so the error of their ratio has both intervals in it, in quadrature of logs
    (Zou and Donner 2008).

    Args:
        name: "chain" or "tree".
        predicted, measured: tau forecast, and of the engine, each with its document interval.
        impressive: 0.03 for a chain, 0.05 for a tree.
    """
    ratio = math.log(predicted.value / measured.value)
    down = math.hypot(math.log(predicted.value / predicted.low), math.log(measured.high / measured.value))
    up = math.hypot(math.log(predicted.high / predicted.value), math.log(measured.value / measured.low))
    sizes = [abs(math.expm1(edge)) for edge in (ratio - down, ratio + up)]
    low = 0.0 if abs(ratio) <= (down if ratio > 0 else up) else min(sizes)
    found = Interval(abs(math.expm1(ratio)), low, max(sizes), measured.n, measured.documents)
    return at_most(f"F4 {name} relative error", found, 0.10, impressive)


def claim_f5(excess: Sequence[Interval], residual: Sequence[float], gap: Sequence[float]) -> Claim:
    """F5: E H(q) - E H(p) > 0 at every depth; impressive where the tempered residual is <= 5% of the gap.

    Args:
        excess: per depth, E H(q) - E H(p), nats.
        residual, gap: per depth, after temperature scaling, nats.

    The reported interval is that of the depth nearest to the wrong sign.
    """
    worst = min(excess, key=lambda each: each.low)
    wrong = any(each.high <= 0 for each in excess)
    small = all(abs(r) <= 0.05 * g for r, g in zip(residual, gap, strict=True))
    verdict = _verdict(worst.low > 0, wrong)
    return Claim("F5 excess entropy", worst.value, worst, "> 0 at every depth", verdict, small)
