"""The self-check: sources with a known surplus, run through the very pipeline that measures a real target.

An instrument that misses these numbers measures nothing. Two controls need a target: the numerics floor, which every
capture measures, and a target of random weights (`tests/surplus/test_untrained.py`). Each check is a function of its
size, so that tests run small ones. Everything here is seeded and single-process; the full list takes well under a
minute on one core.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specdec.surplus.contract import TargetHead
from specdec.surplus.control import Ngram, TableSettings, cross_entropies
from specdec.surplus.estimate import (
    Estimate,
    EstimateSettings,
    Split,
    cross_entropies_of,
    cross_fit,
    fit_bank,
    split,
)
from specdec.surplus.folds import make_folds
from specdec.surplus.geometry import forecast
from specdec.surplus.interval import resamples
from specdec.surplus.labels import TableLabels
from specdec.surplus.nce import NceSettings, agreement, critic_values, fit_critic
from specdec.surplus.probe import ProbeData, ProbeSettings, fit_probes, permuted
from specdec.surplus.sources import HiddenMarkov, LagCopy, Toy, mess3, random_markov

LENGTH = 64
BURN = 12
"""Contexts before this position have not seen enough of the past for the stationary formula."""


@dataclass(frozen=True, slots=True)
class Check:
    """One control.

    Attributes:
        name: what is controlled.
        expected, measured, tolerance: in nats unless the name says otherwise; passed is |difference| <=
            tolerance, or measured <= expected + tolerance for a one-sided check.
    """

    name: str
    expected: float
    measured: float
    tolerance: float
    passed: bool


def near(name: str, expected: float, measured: float, tolerance: float) -> Check:
    """A two-sided check."""
    return Check(name, expected, measured, tolerance, abs(measured - expected) <= tolerance)


def probe_data(toy: Toy) -> ProbeData:
    """A toy as probe data: exact laws as labels, identity as embedding and unembedding."""
    eye = torch.eye(toy.log_probs.shape[1])
    return ProbeData(toy.ids, toy.doc, toy.features, TableLabels(toy.log_probs), eye, eye)


def toy_settings(depth: int, rotations: int = 3) -> EstimateSettings:
    """Small probes: a toy needs neither width nor seeds."""
    probe = ProbeSettings(width=96, rank=64, token_width=16, epochs=14, patience=3, rate=4e-3)
    return EstimateSettings(
        folds=5,
        rotations=rotations,
        seeds=1,
        depths=(depth,),
        probe=probe,
        table=TableSettings(epochs=2),
        shuffled=False,
        skip=BURN,
    )


def _estimate(toy: Toy, data: ProbeData, depth: int) -> Estimate:
    return cross_fit(data, toy.position, toy_settings(depth))[depth]


def check_markov(documents: int = 150, seed: int = 0) -> Check:
    """Order-1 Markov: z holds everything, |S_3| <= 0.01."""
    generator = torch.Generator().manual_seed(seed)
    toy = random_markov(16, generator).sample(documents, LENGTH, generator)
    rows = _estimate(toy, probe_data(toy), 3).scores
    return near("order-1 Markov, S_3", 0.0, float(rows.surplus.mean()), 0.01)


def check_lag_copy(documents: int = 200, seed: int = 0) -> Check:
    """Lag-2 copy against its closed form, within 5%."""
    source = LagCopy(symbols=64, epsilon=0.2)
    toy = source.sample(documents, LENGTH, torch.Generator().manual_seed(seed))
    rows = _estimate(toy, probe_data(toy), 2).scores
    return near("lag-2 copy, S_2", source.surplus, float(rows.surplus.mean()), 0.05 * source.surplus)


def hmm_toy(documents: int, seed: int) -> tuple[HiddenMarkov, Toy]:
    """Mess3 with slow states (surplus 0.11 nats) and its log-belief features."""
    source = mess3(alpha=0.9, x=0.02)
    return source, source.sample(documents, LENGTH, torch.Generator().manual_seed(seed))


def check_hmm(documents: int = 450, seed: int = 1) -> Check:
    """Mess3 against the enumerated eta_2 - eta_inf, within 0.01."""
    source, toy = hmm_toy(documents, seed)
    rows = _estimate(toy, probe_data(toy), 2).scores
    return near("Mess3, S_2", source.surplus(2, horizon=12), float(rows.surplus.mean()), 0.01)


def check_next_state(documents: int = 150, seed: int = 2) -> Check:
    """h_{t+1} in place of h_t: p_2 is a function of it, so the gap is at most 0.02."""
    _, toy = hmm_toy(documents, seed)
    last = toy.ids.shape[0] - 1
    donor = {2: (torch.arange(last + 1) + 1).clamp_max(last)}
    gap = float(_estimate(toy, replace(probe_data(toy), donor=donor), 2).scores.gap.mean())
    return Check("h_{t+1} fed, gap", 0.0, gap, 0.02, gap <= 0.02)


def _one_split(toy: Toy, data: ProbeData) -> Split:
    settings = toy_settings(2)
    return split(data, make_folds(toy.doc, folds=settings.folds)[0], toy.position, settings)


def check_permuted(documents: int = 150, seed: int = 3) -> Check:
    """h permuted within equal z against the same architecture fed zeros: 0 within 2 standard errors.

    Both start from the law without context and must learn z by themselves; the error counts documents and
    seeds.
    """
    _, toy = hmm_toy(documents, seed)
    data = probe_data(toy)
    parts = _one_split(toy, data)
    flat = {2: Ngram(mean_law(data, parts), (), (), name="no context")}
    zero = replace(data, features=torch.zeros_like(data.features))
    differences = []
    for run in range(3):
        recipe = replace(toy_settings(2).probe, seed=run)
        crossed = []
        for fed in (zero, permuted(data, parts.masks, (2,), run)):
            fitted = fit_probes(fed, parts.train, parts.val, flat, recipe)[2]
            crossed.append(cross_entropies_of(fitted, fed, parts.test[2]))
        differences.append(crossed[0] - crossed[1])
    each = torch.stack(differences)
    over_documents = resamples(toy.doc[parts.test[2].at]).mean(each.mean(0)).standard_error
    over_seeds = float(each.mean(1).std()) / each.shape[0] ** 0.5
    error = (over_documents**2 + over_seeds**2) ** 0.5
    return near("h permuted within equal z, S_2", 0.0, float(each.mean()), 2 * error)


def mean_law(data: ProbeData, parts: Split) -> Tensor:
    """Mean label law of the training contexts: [M]."""
    law: Tensor = data.labels.rows(parts.train[2].label_row).exp().mean(0)
    return law


def check_agreement(documents: int = 200, seed: int = 4) -> Check:
    """E1 and E2 on Mess3: within max(0.03 nats, 5%)."""
    _, toy = hmm_toy(documents, seed)
    data = probe_data(toy)
    parts = _one_split(toy, data)
    settings = toy_settings(2)
    control = fit_bank(data, parts, 2, settings).best
    train, val, test = parts.train[2], parts.val[2], parts.test[2]
    probe = fit_probes(data, {2: train}, {2: val}, {2: control}, settings.probe)[2]
    critic = fit_critic(data, train, val, control, NceSettings(settings.probe))
    drawn = resamples(toy.doc[test.at])
    e1 = drawn.mean(cross_entropies(control, test, data.labels) - cross_entropies_of(probe, data, test))
    both = agreement(e1, drawn.mean(critic_values(critic, data, test)))
    return near("E2 against E1 on Mess3, S_2", both.e1.value, both.e2.value, both.allowed)


def check_geometry(seed: int = 5) -> Check:
    """1/2 e'Ge against the exact KL for a small error through RMSNorm: a ratio of 1 within 2%."""
    generator = torch.Generator().manual_seed(seed)
    head = TargetHead(
        torch.randn(200, 32, generator=generator), 1 + 0.1 * torch.randn(32, generator=generator), 1e-6
    )
    state = 3 * torch.randn(64, 32, generator=generator)
    error = 0.02 * torch.randn(64, 32, generator=generator)
    found = forecast(head, state, error, top=200)
    ratio = float(found.kl.sum() / found.exact_kl.sum())
    return near("Fisher metric, KL forecast over exact KL (ratio)", 1.0, ratio, 0.02)


def self_check() -> list[Check]:
    """Every closed-form control, in the order of the table it makes."""
    return [
        check_permuted(),
        check_markov(),
        check_lag_copy(),
        check_hmm(),
        check_next_state(),
        check_agreement(),
        check_geometry(),
    ]
