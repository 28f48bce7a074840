"""Plans: what a budget buys, in documents, depths, folds, probe sizes and label symbols, and about how long it takes.

A plan is decided before anything runs and printed with the report, cuts included; cells and thresholds are thereby
fixed before the outcome is known. Knows sizes, no model. Dimension legend: N captured rows, F feature width, M label
symbols, d hidden width, V vocabulary.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import torch

from specdec.drafting.protocol import Shape
from specdec.errors import RequestError
from specdec.surplus.control import TableSettings
from specdec.surplus.estimate import EstimateSettings
from specdec.surplus.folds import DOCUMENTS_PER_FOLD
from specdec.surplus.interval import MIN_DOCUMENTS
from specdec.surplus.probe import ProbeSettings

TapSet = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a report computes.

    Attributes:
        budget: its name.
        documents, max_tokens: prompts dealt into roles at most; tokens of one answer.
        depths: k of the probes; 2 is the first draft token.
        folds, rotations, ranking_rotations, seeds: of the cross-fit; ranking compares tap sets by the small probe.
        symbols: tokens kept as label symbols, the rest one tail symbol; 0 keeps the vocabulary.
        probe, small: the large probe and the draft-sized one.
        table: of the neural-table control.
        draft_depth: draft tokens per round of the head.
        head_rows: contexts on which the head is scored on the full vocabulary, in whole documents, about.
        shapes: trees whose acceptance the engine measures, by name.
        shape_documents: predictor documents decoded only to learn the shape of trees.
        draws: bootstrap resamples.
        shuffled: fit the permuted-h control in every cell too, as a member of the bank.
        nce: run E2 and the permuted-h control on the first fold.
        curve, sigmas, windows: cross-checks to run.
        least_events: a cell with fewer measured draft tokens is left out.
        outcome_share: of documents whose acceptance is measured; the rest predict.
        predictors, outcomes: of those roles at most so many are captured and decoded.
        ranking_depths: how many of `depths` a ranking of tap sets uses.
        slots: answers written at once, and documents per captured shard.
        cuts: what this budget leaves out, in words.
    """

    budget: str
    documents: int
    max_tokens: int
    depths: tuple[int, ...]
    folds: int
    rotations: int
    ranking_rotations: int
    seeds: int
    symbols: int
    probe: ProbeSettings
    small: ProbeSettings
    table: TableSettings
    draft_depth: int
    head_rows: int
    shapes: dict[str, Shape]
    shape_documents: int
    draws: int
    shuffled: bool
    nce: bool
    curve: bool
    sigmas: tuple[float, ...]
    windows: tuple[int, ...]
    least_events: int = 100
    outcome_share: float = 0.4
    predictors: int = 1 << 30
    outcomes: int = 1 << 30
    ranking_depths: int = 2
    slots: int = 16
    cuts: tuple[str, ...] = field(default=())

    def estimate(self, *, ranking: bool = False, small: bool = False) -> EstimateSettings:
        """Cross-fit settings of the main tap set, of a ranking of tap sets, or of the draft-sized probe."""
        return EstimateSettings(
            folds=self.folds,
            rotations=self.ranking_rotations if ranking else self.rotations,
            seeds=1 if ranking else self.seeds,
            depths=self.depths[: self.ranking_depths] if ranking else self.depths,
            probe=self.small if small or ranking else self.probe,
            table=self.table,
            shuffled=self.shuffled and not ranking and not small,
        )

    @property
    def predictors_needed(self) -> int:
        """Fewest captured documents that fill the folds and leave enough tested ones for every interval."""
        tested = -(-MIN_DOCUMENTS // min(self.rotations, self.ranking_rotations))
        return self.folds * max(DOCUMENTS_PER_FOLD, tested)

    def documents_needed(self, *, head: bool) -> int:
        """Fewest prompts: predictors, and with a head as many outcome documents as an interval wants."""
        if not head:
            return self.predictors_needed
        both = max(self.predictors_needed / (1 - self.outcome_share), MIN_DOCUMENTS / self.outcome_share)
        return int(-(-both // 1))


def _chain(depth: int) -> Shape:
    return Shape(depth, 1, depth + 1)


def _sampled(depth: int) -> Shape:
    return Shape(depth, 1, depth + 1, sampled=True)


QUICK = Plan(
    budget="quick",
    documents=150,
    max_tokens=96,
    depths=(2, 3, 4),
    folds=5,
    rotations=3,
    ranking_rotations=1,
    seeds=1,
    symbols=2048,
    probe=ProbeSettings(width=384, rank=64, token_width=32, epochs=10, patience=2),
    small=ProbeSettings(width=96, rank=32, token_width=16, epochs=10, patience=2),
    table=TableSettings(width=128, rank=32, epochs=2),
    draft_depth=5,
    head_rows=8000,
    shapes={"chain": _chain(5), "tree": Shape(5, 4, 16)},
    shape_documents=4,
    draws=500,
    shuffled=False,
    nce=True,
    curve=False,
    sigmas=(0.0, 0.5, 2.0),
    windows=(),
    cuts=(
        "probe depths k = 2 to 4, chains of 5 drafts, trees of 16 nodes",
        "3 of 5 folds tested, one probe seed",
        "labels keep 2,048 tokens, the rest is one symbol",
        "tap sets are ranked on one fold at k = 2 and 3, by the draft-sized probe",
        "no learning curve or window curve",
    ),
)
STANDARD = replace(
    QUICK,
    budget="standard",
    documents=288,
    outcome_share=0.3,
    predictors=200,
    outcomes=63,
    max_tokens=128,
    depths=(2, 3, 4, 5, 6),
    rotations=2,
    ranking_depths=1,
    probe=ProbeSettings(width=256, rank=64, token_width=48, epochs=10, patience=2, batch=128, rate=1e-3),
    small=ProbeSettings(width=64, rank=32, token_width=24, epochs=8, patience=2, batch=128, rate=1e-3),
    shapes={"chain": _chain(5), "tree": Shape(5, 4, 12), "sampled chain": _sampled(5)},
    draft_depth=5,
    head_rows=1 << 30,
    shape_documents=14,
    draws=1000,
    shuffled=False,
    curve=True,
    sigmas=(0.0, 0.5, 2.0),
    windows=(1, 2),
    cuts=(
        "2 of 5 folds tested, one probe seed, trees of 12 nodes",
        "labels keep 2,048 tokens, the rest is one symbol",
        "tap sets are ranked on one fold at k = 2 by the draft-sized probe; the permuted-h control is fitted there too",
    ),
)
FULL = replace(
    STANDARD,
    budget="full",
    documents=1000,
    max_tokens=256,
    rotations=5,
    outcome_share=0.4,
    predictors=1 << 30,
    outcomes=1 << 30,
    ranking_depths=2,
    shuffled=True,
    ranking_rotations=2,
    seeds=3,
    symbols=8192,
    probe=ProbeSettings(width=1024, rank=128),
    small=ProbeSettings(width=256, rank=64),
    table=TableSettings(),
    shapes={"chain": _chain(7), "tree": Shape(7, 10, 60), "sampled chain": _sampled(7)},
    head_rows=50000,
    shape_documents=32,
    sigmas=(0.0, 0.25, 0.5, 1.0, 2.0, 4.0),
    windows=(1, 2, 4, 8, 16),
    cuts=("labels keep 8,192 tokens, the rest is one symbol",),
)
BUDGETS = {plan.budget: plan for plan in (QUICK, STANDARD, FULL)}


def plan_of(budget: str) -> Plan:
    """The plan of a budget. Raises RequestError naming the budgets there are."""
    if budget not in BUDGETS:
        raise RequestError("no such budget", field="budget", value=budget, allowed=", ".join(BUDGETS))
    return BUDGETS[budget]


def check_documents(plan: Plan, found: int, *, head: bool) -> None:
    """Refuse too little text. Raises RequestError with the number needed."""
    need = plan.documents_needed(head=head)
    if found < need:
        raise RequestError(
            f"too little text for an interval: {need} prompts are needed",
            field="prompts",
            value=found,
            allowed=f">= {need}",
            remedy="Give more prompt files; each distinct prompt becomes one document.",
        )


def candidate_taps(layers: int) -> tuple[TapSet, ...]:
    """Tap sets worth ranking: EAGLE-3's three, its neighbours, pairs and single layers.

    >>> candidate_taps(30)[0]
    (2, 15, 27)
    """
    n = layers
    wanted = [
        (2, n // 2, n - 3),
        (n // 4, n // 2, 3 * n // 4),
        (1, n // 2, n - 1),
        (n // 2, 3 * n // 4, n),
        (n - 3, n - 1, n),
        (n // 2, n),
        (n - 3,),
        (n // 2,),
        (n,),
    ]
    sound = [taps for taps in wanted if sorted(set(taps)) == list(taps) and taps[0] >= 0 and taps[-1] <= n]
    return tuple(dict.fromkeys(sound))


def name_of(taps: TapSet) -> str:
    """ "2+15+27"."""
    return "+".join(map(str, taps))


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the cost of a plan depends on.

    Attributes:
        hidden, layers, vocab: of the target.
        documents, outcomes: captured, and decoded by the engine.
        tap_widths: number of taps of each tap set, the main one first.
    """

    hidden: int
    layers: int
    vocab: int
    documents: int
    outcomes: int
    tap_widths: tuple[int, ...]


def arithmetic_rate(seconds: float = 0.2) -> float:
    """Floating-point operations per second of a matrix product here: the fastest within `seconds`, since whoever else
    uses the machine now may be gone soon."""
    left, right = torch.randn(512, 768), torch.randn(768, 768)
    until, fastest = time.perf_counter() + seconds, float("inf")
    while (began := time.perf_counter()) < until:
        left @ right
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * 512 * 768 * 768 / fastest


def estimated_minutes(plan: Plan, sizes: Sizes, rate: float) -> dict[str, float]:
    """Minutes by stage, to within a factor of two: enough to choose a budget.

    Args:
        rate: from `arithmetic_rate`; with softmaxes and few rows at a time about half of it is reached.
    """
    d, rows = sizes.hidden, sizes.documents * plan.max_tokens
    forward = 2.0 * (12 * sizes.layers * d * d + sizes.vocab * d)
    # Decoding one token costs about three rows of a long prefill: it waits for memory.
    # the control runs the target once more on every row's next few tokens
    capture = rows * forward * (4 + sum(plan.windows) + max(plan.depths) / 3)
    rounds = sizes.outcomes * plan.max_tokens / 2  # at two tokens per round
    engine = (
        rounds * forward * sum(2 + shape.nodes for shape in plan.shapes.values()) if sizes.outcomes else 0.0
    )
    fits = [
        _fits(plan, main=place == 0) * _fit_cost(plan, sizes, taps)
        for place, taps in enumerate(sizes.tap_widths)
    ]
    labels = 2.0 * rows * d * sizes.vocab
    scored = min(rows, plan.head_rows) * plan.draft_depth * 6.0 * d * sizes.vocab if sizes.outcomes else 0.0
    scale = 2 / rate / 60
    return {
        "capture": capture * scale,
        "probes": (sum(fits) + labels) * scale,
        "engine": (engine + scored) * scale,
    }


def _fit_cost(plan: Plan, sizes: Sizes, taps: int) -> float:
    """Operations of one probe training at one depth: three of five folds, stopped after about 0.7 of the epochs."""
    symbols, d = plan.symbols or sizes.vocab, sizes.hidden
    width, rank = plan.probe.width, plan.probe.rank
    per_row = 6.0 * (taps * d * width + width * rank + rank * symbols + 8 * symbols)
    per_row += 6.0 * symbols * d * rank / plan.probe.batch
    return per_row * sizes.documents * plan.max_tokens * 0.7 * plan.probe.epochs * 0.8


def _fits(plan: Plan, *, main: bool) -> float:
    """Probe trainings of one tap set, by depth and fold; the main one has the controls and the small probe too."""
    ranked = plan.ranking_rotations * len(plan.depths[:2])
    if not main:
        return ranked
    once = plan.rotations * len(plan.depths) * (plan.seeds + plan.shuffled + 0.3)
    return ranked + once + len(plan.sigmas) + len(plan.windows) + 2 * plan.nce + 4 * plan.curve
