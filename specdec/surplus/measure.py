"""The probe side of a report: labels, cells, tap ranking, cross-checks and geometry of one captured text.

Everything here is measured before any draft is verified. Knows captured tensors and plans; no engine, no head.
Dimension legend: N rows, V vocabulary, M label symbols, d hidden width, e token width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from specdec.errors import RequestError
from specdec.surplus.cells import ENTROPY_EDGES, POSITION_EDGES, bin_names, slice_cells
from specdec.surplus.control import cross_entropies
from specdec.surplus.curve import fit_power_law, learning_curve
from specdec.surplus.dose import DoseCurve, noise_response, window_response
from specdec.surplus.estimate import (
    Estimate,
    EstimateSettings,
    cross_entropies_of,
    cross_fit,
    fit_bank,
    split,
)
from specdec.surplus.folds import make_folds
from specdec.surplus.interval import Interval, resamples
from specdec.surplus.landscape import alignment
from specdec.surplus.material import Material
from specdec.surplus.nce import NceSettings, agreement, critic_values, fit_critic
from specdec.surplus.plan import Plan, TapSet, name_of
from specdec.surplus.probe import fit_probes, permuted
from specdec.surplus.rows import load_estimates, save_estimates
from specdec.surplus.values import Value, cell_row, clean, number


def estimate(
    material: Material, taps: TapSet, settings: EstimateSettings, path: Path, key: str
) -> dict[int, Estimate]:
    """E1 of one tap set, kept at `path` between runs; `key` names all that it depends on."""
    kept = load_estimates(path, key)
    if kept is None:
        c, started = material.captured, time.process_time()
        kept = cross_fit(material.data(taps), c.position, settings, domain=c.domain)
        save_estimates(path, kept, key, time.process_time() - started)
    return kept


def cells(material: Material, taps: TapSet, estimates: Mapping[int, Estimate], plan: Plan) -> Value:
    """The table of the main tap set: by depth, and by depth and domain, position or entropy."""
    c, found, thin = material.captured, list[Value](), list[dict[str, str]]()
    for depth, each in estimates.items():
        base = {"taps": name_of(taps), "depth": str(depth)}
        at = each.scores.at
        views: list[dict[str, list[str]]] = [
            {},
            {"domain": [c.domains[i] for i in c.domain[at].tolist()]},
            {"position": bin_names(c.position[at], POSITION_EDGES, "tokens")},
            {"entropy": bin_names(each.scores.entropy, ENTROPY_EDGES, "nats")},
        ]
        for factors in views:
            table = slice_cells(each, base, factors, plan.draws)
            found += [cell_row(cell) for cell in table.cells]
            thin += [dict(key) for key in table.thin]
    return {"cells": found, "thin": thin, "bank": {str(k): dict(e.bank) for k, e in estimates.items()}}


def ranking(material: Material, found: Mapping[TapSet, Mapping[int, Estimate]], plan: Plan) -> list[Value]:
    """Tap sets from the smallest mean gap to the largest, with what a head on them may expect.

    All are scored on the same contexts, some of which are hard for every one: `behind` is the distance to the best,
    context by context, and its interval tells sets apart whose own intervals overlap.
    """
    gaps = {taps: torch.cat([each.scores.gap for each in told.values()]) for taps, told in found.items()}
    best = min(gaps.values(), key=lambda gap: float(gap.mean()))
    rows = []
    for taps, estimates in found.items():
        drawn = resamples(torch.cat([each.scores.doc for each in estimates.values()]), draws=plan.draws)
        one = [resamples(e.scores.doc, draws=plan.draws).mean(e.scores.top[:, 0]) for e in estimates.values()]
        rows.append(
            {
                "taps": name_of(taps),
                "gap": number(drawn.mean(gaps[taps])),
                "behind": number(drawn.mean(gaps[taps] - best)),
                "depths": sorted(estimates),
                "alpha": {str(k): number(each) for k, each in zip(estimates, one, strict=True)},
                "tau": clean(extended_tau([each.value for each in one], plan.draft_depth)),
                **alignment(material, taps),
            }
        )
    return sorted(rows, key=lambda row: row["gap"]["value"])


def extended_tau(alpha: list[float], depth: int) -> float:
    """Tokens per round of a chain if acceptance at unmeasured depths stays what it is at the last one.

    >>> extended_tau([0.5], 2)
    1.75
    """
    total = reach = 1.0
    for j in range(depth):
        reach *= alpha[min(j, len(alpha) - 1)]
        total += reach
    return total


def domains(material: Material, estimates: Mapping[int, Estimate], plan: Plan) -> list[Value]:
    """Where drafting will pay: per domain the probe's acceptance and the tau of a chain built on it."""
    c, rows = material.captured, []
    for number_of, name in enumerate(c.domains):
        alpha, first = [], None
        for each in estimates.values():
            keep = c.domain[each.scores.at] == number_of
            try:
                found = resamples(each.scores.doc[keep], draws=plan.draws).mean(each.scores.top[keep, 0])
            except RequestError:
                break
            first = first or found
            alpha.append(found.value)
        if first is not None:
            tau = clean(extended_tau(alpha, plan.draft_depth))
            rows.append({"domain": name, "alpha": number(first), "tau": tau})
    return sorted(rows, key=lambda row: -row["alpha"]["value"])


def cross_check(material: Material, taps: TapSet, plan: Plan) -> Value:
    """E2 against E1 at k = 2 on the first fold."""
    c, settings = material.captured, plan.estimate()
    data = material.data(taps)
    fold = make_folds(c.doc, folds=plan.folds, domain=c.domain)[0]
    parts = split(data, fold, c.position, settings)
    control = fit_bank(data, parts, 2, settings).best
    train, val, test = parts.train[2], parts.val[2], parts.test[2]
    probe = fit_probes(data, {2: train}, {2: val}, {2: control}, settings.probe)[2]
    critic = fit_critic(data, train, val, control, NceSettings(settings.probe))
    drawn = resamples(c.doc[test.at], draws=plan.draws, minimum=2)
    e1 = drawn.mean(cross_entropies(control, test, data.labels) - cross_entropies_of(probe, data, test))
    both = agreement(e1, drawn.mean(critic_values(critic, data, test)))
    return {"e1": number(both.e1), "e2": number(both.e2), "allowed": clean(both.allowed), "holds": both.holds}


def curve(material: Material, taps: TapSet, plan: Plan) -> Value:
    """The learning curve of the gap and its limit, per depth."""
    found = learning_curve(material.data(taps), material.captured.position, plan.estimate(ranking=True))
    told: Value = {}
    for depth, points in found.items():
        law = fit_power_law([p.contexts for p in points], [p.gap.value for p in points])
        told[str(depth)] = {
            "points": [{"contexts": p.contexts, "gap": number(p.gap)} for p in points],
            "limit": clean(law.limit),
            "exponent": clean(law.exponent),
        }
    return told


def noise_curve(material: Material, taps: TapSet, plan: Plan) -> Value:
    """E3, noise: the surplus at k = 2 must fall with noise on the features."""
    found = noise_response(material.captured.features(taps), plan.sigmas, surplus_of(material, plan))
    return dose_row(found)


def window_curve(
    material: Material, recompute: Callable[[int], Tensor], windows: Sequence[int], plan: Plan
) -> Value:
    """E3, window: the surplus at k = 2 must rise with the tokens that the state was computed from."""
    return dose_row(window_response(recompute, windows, surplus_of(material, plan)))


def permuted_control(material: Material, taps: TapSet, plan: Plan) -> Value:
    """The negative control on real text: h of another context with equal z, at k = 2 on the first fold.

    `surplus` is what a blind probe finds beyond another blind probe of the same architecture: 0 within two standard
    errors. `excess` is what it finds beyond the bank's best, the control's own excess risk: S and C of the cells are
    too high by that much, the gap is not.
    """
    c, settings = material.captured, plan.estimate()
    data = material.data(taps)
    parts = split(data, make_folds(c.doc, folds=plan.folds, domain=c.domain)[0], c.position, settings)
    control, test = fit_bank(data, parts, 2, settings).best, parts.test[2]
    crossed = []
    for seed in (1, 2):
        blind = permuted(data, parts.masks, (2,), seed)
        recipe = replace(settings.probe, seed=seed)
        fitted = fit_probes(blind, {2: parts.train[2]}, {2: parts.val[2]}, {2: control}, recipe)[2]
        crossed.append(cross_entropies_of(fitted, blind, test))
    drawn = resamples(c.doc[test.at], draws=plan.draws, minimum=2)
    found = drawn.mean(crossed[0] - crossed[1])
    excess = drawn.mean(cross_entropies(control, test, data.labels) - crossed[1])
    holds = abs(found.value) <= 2 * found.standard_error
    return {"surplus": number(found), "excess": number(excess), "holds": holds}


def bounds(rows: Sequence[Value]) -> Value:
    """0 <= S <= C in every cell, that is S and the gap not below 0; broken where a whole interval lies below."""
    broken = [
        " ".join(f"{name} {level}" for name, level in row["key"].items() if name != "taps")
        for row in rows
        if min(row["surplus"]["high"], row["gap"]["high"]) < 0
    ]
    below = sum(row["surplus"]["value"] < 0 or row["gap"]["value"] < 0 for row in rows)
    return {"cells": len(rows), "below": below, "broken": broken}


def surplus_of(material: Material, plan: Plan) -> Callable[[Tensor], Interval]:
    """Features [N, F] -> surplus at k = 2 on the first fold."""
    return _Surplus(material, plan)


@dataclass(frozen=True, slots=True)
class _Surplus:
    material: Material
    plan: Plan

    def __call__(self, features: Tensor) -> Interval:
        c = self.material.captured
        base = self.material.data(c.layers[:1])
        data = replace(base, features=features)
        short = self.plan.estimate(ranking=True)
        settings = EstimateSettings(
            folds=short.folds, rotations=1, seeds=1, depths=(2,), probe=short.probe, table=short.table,
            shuffled=False,
        )  # fmt: skip
        rows = cross_fit(data, c.position, settings, domain=c.domain)[2].scores
        return resamples(rows.doc, draws=self.plan.draws, minimum=2).mean(rows.surplus)


def dose_row(found: DoseCurve) -> Value:
    """A dose curve as values."""
    return {
        "name": found.name,
        "doses": list(found.doses),
        "surplus": [number(each) for each in found.surplus],
        "rising": found.rising,
        "holds": found.holds,
    }
