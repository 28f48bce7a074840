"""From probes to numbers: surplus S_k, ceiling C_k = S_k + Delta_k, gap Delta_k, with document intervals.

The paper's surplus of K tokens, I(h_t; x_{t+2:t+K} | x_{t+1}) (arXiv 2507.19247, second version), is the sum over
k = 2 .. K of S_k = I(h_t; x_{t+k} | x_{t+1:t+k-1}) by the chain rule; what a probe of limited size uses of that is
conditional V-information (Hewitt et al. 2109.09234). Cross-fits over document folds: every context is scored once, by
probes that never saw its document. The control-free gap is the headline; the ceiling inherits the control's excess
risk. Knows nothing of targets.
Dimension legend: n contexts, M label symbols, m children counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from specdec.errors import RequestError
from specdec.surplus.banks import bank_key
from specdec.surplus.contract import Contexts
from specdec.surplus.control import (
    Bank,
    Control,
    NeuralTable,
    TableSettings,
    batches,
    cross_entropies,
    fit_ngram,
    fit_table,
    make_bank,
    soft_labels,
    tune,
)
from specdec.surplus.folds import Fold, among, make_folds
from specdec.surplus.mixture import mixed
from specdec.surplus.probe import Fitted, ProbeData, ProbeSettings, fit_probes, permuted

TOPS = (1, 2, 4, 10)
"""Children counts m for which the mass A_m is kept; 10 is EAGLE-2's branching."""


@dataclass(frozen=True, slots=True)
class Scores:
    """One row per context, averaged over seeds; float32 [n] unless said otherwise, nats where an information.

    Attributes:
        at, doc: int64, the row t and its document.
        surplus: s(c) = sum p (log q - log r*).
        gap: d(c) = sum p (log p - log q), unrecovered information.
        alpha: a(c) = sum min(p, q).
        entropy: H(p_k).
        confidence: max q.
        spread_q: H(q).
        top: [n, m] p-mass of the top-m of q, m in TOPS.
        ideal: [n, m] p-mass of the top-m of p: what a perfect draft would get.
    """

    at: Tensor
    doc: Tensor
    surplus: Tensor
    gap: Tensor
    alpha: Tensor
    entropy: Tensor
    confidence: Tensor
    spread_q: Tensor
    top: Tensor
    ideal: Tensor

    def take(self, keep: Tensor) -> Scores:
        """Rows picked by a mask or index."""
        return _columns(lambda name: getattr(self, name)[keep])


def _columns(build: Callable[[str], Tensor]) -> Scores:
    return Scores(**{name: build(name) for name in Scores.__slots__})


def join(parts: list[Scores]) -> Scores:
    """Concatenate rows."""
    return _columns(lambda name: torch.cat([getattr(part, name) for part in parts]))


def score(where: Contexts, doc: Tensor, log_p: Tensor, log_q: Tensor, control: Tensor) -> Scores:
    """Per-context rows of any q, probe or draft head: the same test code for both (the waterfall).

    Args:
        where: n contexts.
        doc: int64 [T].
        log_p, log_q: float32 [n, M]; q must be positive where p is (a draft vocabulary: see
            `predict.truncated`).
        control: float32 [n], cross-entropy of r* on each context.
    """
    p, q = log_p.exp(), log_q.exp()
    entropy = -(p * log_p.clamp_min(-1e4)).sum(-1)
    crossed = -(p * log_q.clamp_min(-1e4)).sum(-1)
    widest = min(max(TOPS), q.shape[1])
    counts = torch.tensor([min(m, widest) - 1 for m in TOPS])
    by_q = p.gather(1, q.topk(widest, dim=-1).indices).cumsum(-1)[:, counts]
    by_p = p.topk(widest, dim=-1).values.cumsum(-1)[:, counts]
    return Scores(
        at=where.at,
        doc=doc[where.at],
        surplus=control - crossed,
        gap=crossed - entropy,
        alpha=torch.minimum(p, q).sum(-1),
        entropy=entropy,
        confidence=q.max(-1).values,
        spread_q=-(q * log_q.clamp_min(-1e4)).sum(-1),
        top=by_q,
        ideal=by_p,
    )


@dataclass(frozen=True, slots=True)
class EstimateSettings:
    """How a cross-fit is run.

    Attributes:
        folds: parts; `rotations` of them are run (fewer cuts cost and the tested text alike).
        seeds: probes per fold; rows average over them.
        depths: k >= 2.
        probe, table: of the probe and the neural-table control.
        shuffled: fit the permuted-h control too (doubles the probe cost).
        symbols: label symbols per row that the soft n-gram stores.
        skip: positions t below this are left out (start-of-text states are outliers).
    """

    folds: int = 5
    rotations: int = 5
    seeds: int = 3
    depths: tuple[int, ...] = (2, 3, 4, 5, 6)
    probe: ProbeSettings = field(default_factory=ProbeSettings)
    table: TableSettings = field(default_factory=TableSettings)
    shuffled: bool = True
    symbols: int = 64
    skip: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.rotations <= self.folds:
            raise RequestError(
                "more rotations than folds",
                field="rotations",
                value=self.rotations,
                allowed=f"1 to {self.folds}",
            )


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a cross-fit found at one depth.

    Attributes:
        depth: k.
        scores: per-context rows over all tested documents.
        bank: validation cross-entropy of each control, mean over rotations, nats.
        seed_spread: standard error of the mean gap from probe seeds, nats.
    """

    depth: int
    scores: Scores
    bank: Mapping[str, float]
    seed_spread: float

    @property
    def control_spread(self) -> float:
        """Largest minus smallest of the bank: systematic error of the surplus, nats."""
        return max(self.bank.values()) - min(self.bank.values())


@dataclass(frozen=True, slots=True)
class Split:
    """Contexts per depth of a rotation's three parts, and their row masks."""

    train: Mapping[int, Contexts]
    val: Mapping[int, Contexts]
    test: Mapping[int, Contexts]
    masks: tuple[Tensor, Tensor, Tensor]


def split(data: ProbeData, fold: Fold, position: Tensor, settings: EstimateSettings) -> Split:
    """Cut the contexts of a rotation, leaving out rows t with position below `skip`."""
    late = position >= settings.skip
    masks = (
        among(data.doc, fold.train) & late,
        among(data.doc, fold.val) & late,
        among(data.doc, fold.test) & late,
    )
    train, val, test = ({k: data.contexts(k, mask) for k in settings.depths} for mask in masks)
    return Split(train, val, test, masks)


def fit_bank(data: ProbeData, parts: Split, depth: int, settings: EstimateSettings) -> Bank:
    """The controls that see z only: tuned soft n-gram, neural table from its base law, the target on z, and a mixture.

    Fitted once per text and split, whatever the features.
    """
    train, val = parts.train[depth], parts.val[depth]
    key = bank_key(train, val, settings.table, settings.symbols)
    return data.banks.get(key, lambda: _fit_bank(data, train, val, settings))


def _fit_bank(data: ProbeData, train: Contexts, val: Contexts, settings: EstimateSettings) -> Bank:
    seen = soft_labels(data.labels, train.label_row, top=settings.symbols)
    ngram = tune(fit_ngram(train.z, seen, data.labels.width), val, data.labels)
    tokens, unembedding = data.tokens.float(), data.unembedding.float()
    state = torch.random.get_rng_state()
    torch.manual_seed(settings.table.seed)
    table = NeuralTable(tokens, unembedding, ngram.base, train.depth - 1, settings.table)
    torch.random.set_rng_state(state)
    controls: list[Control] = [ngram, fit_table(table, train, val, data.labels, settings.table)]
    if train.depth in data.briefs:
        brief = data.briefs[train.depth]
        controls += [brief, mixed(brief, ngram, val, data.labels)]
    return make_bank(controls, val, data.labels)


def cross_fit(
    data: ProbeData,
    position: Tensor,
    settings: EstimateSettings,
    *,
    domain: Tensor | None = None,
    seed: int = 0,
) -> dict[int, Estimate]:
    """E1 over document folds: one `Estimate` per depth.

    Args:
        data: one tap set.
        position: int64 [T].
        domain: optional int64 [T], balances folds.

    Raises:
        RequestError: too few documents for the folds; the message says how many are needed.
    """
    folds = make_folds(data.doc, folds=settings.folds, seed=seed, domain=domain)
    found: dict[int, list[Rotation]] = {k: [] for k in settings.depths}
    for fold in folds[: settings.rotations]:
        for depth, rotation in _rotate(data, split(data, fold, position, settings), settings).items():
            found[depth].append(rotation)
    return {depth: _gather(depth, rotations) for depth, rotations in found.items()}


@dataclass(frozen=True, slots=True)
class Rotation:
    """One fold's test rows at one depth, its bank and the mean gap of each seed."""

    scores: Scores
    bank: Mapping[str, float]
    gaps: tuple[float, ...]


def _rotate(data: ProbeData, parts: Split, settings: EstimateSettings) -> dict[int, Rotation]:
    banks = {k: fit_bank(data, parts, k, settings) for k in settings.depths}
    controls = {k: bank.best for k, bank in banks.items()}
    names = {k: {c.name: v for c, v in zip(b.controls, b.validation, strict=True)} for k, b in banks.items()}
    crossed = {k: cross_entropies(controls[k], parts.test[k], data.labels) for k in settings.depths}
    if settings.shuffled:
        blind = permuted(data, parts.masks, settings.depths, settings.probe.seed)
        for k, fitted in fit_probes(blind, parts.train, parts.val, controls, settings.probe).items():
            names[k]["h permuted"] = fitted.validation
            if fitted.validation < min(banks[k].validation):
                crossed[k] = cross_entropies_of(fitted, blind, parts.test[k])
    by_seed: dict[int, list[Scores]] = {k: [] for k in settings.depths}
    for extra in range(settings.seeds):
        recipe = replace(settings.probe, seed=settings.probe.seed + extra)
        for k, fitted in fit_probes(data, parts.train, parts.val, controls, recipe).items():
            by_seed[k].append(score_probe(fitted, data, parts.test[k], crossed[k]))
    return {
        k: Rotation(_average(rows), names[k], tuple(float(row.gap.mean()) for row in rows))
        for k, rows in by_seed.items()
    }


def score_probe(fitted: Fitted, data: ProbeData, where: Contexts, control: Tensor) -> Scores:
    """Rows of a fitted probe, in chunks."""
    parts = []
    for rows in batches(where.at.shape[0], 2048):
        some = where.take(rows)
        log_p = data.labels.rows(some.label_row)
        parts.append(score(some, data.doc, log_p, fitted.log_probs(data, some), control[rows]))
    return join(parts)


def cross_entropies_of(fitted: Fitted, data: ProbeData, where: Contexts) -> Tensor:
    """Soft cross-entropy of a probe on each context, float32 [n]."""
    parts = []
    for rows in batches(where.at.shape[0], 2048):
        some = where.take(rows)
        parts.append(-(data.labels.rows(some.label_row).exp() * fitted.log_probs(data, some)).sum(-1))
    return torch.cat(parts)


def _average(seeds: list[Scores]) -> Scores:
    def mean(name: str) -> Tensor:
        if name in ("at", "doc"):
            index: Tensor = getattr(seeds[0], name)
            return index
        return torch.stack([getattr(row, name) for row in seeds]).mean(0)

    return _columns(mean)


def _gather(depth: int, rotations: list[Rotation]) -> Estimate:
    bank = {name: sum(r.bank[name] for r in rotations) / len(rotations) for name in rotations[0].bank}
    gaps = torch.tensor([r.gaps for r in rotations], dtype=torch.float64)  # [rotations, seeds]
    # Seeds differ within a fold; averaging over seeds and folds shrinks their deviation by both counts.
    spread = float(gaps.std(1).mean() / gaps.numel() ** 0.5) if gaps.shape[1] > 1 else 0.0
    return Estimate(depth, join([r.scores for r in rotations]), bank, spread)
