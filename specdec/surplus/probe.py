"""E1, the nested conditional probe: log q = log softmax(log q0 + U F([norm(h); enc(z)])).

q0 is the control r, with a linear reader of h in closed form on it where that does better on validation text
(`start`); F's last map begins at zero, so ignoring h is always within reach. h and z meet inside F's non-linearity,
because additive logits recover nothing when only their interaction informs. Trained on the target's own law as soft
labels; a probe is the mean of its last weights, and validation text says how far each context follows it (`trust`).
Probes of several depths walk the text together: a row's label law is computed once. Knows tensors only.
Dimension legend: T rows, F feature width, M label symbols, e token width, k depth, B batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from specdec.errors import RequestError
from specdec.surplus.banks import Banks
from specdec.surplus.contract import Contexts, contexts
from specdec.surplus.control import Control
from specdec.surplus.labels import Labels
from specdec.surplus.mixture import Brief
from specdec.surplus.sources import permute_within
from specdec.surplus.start import WIDEST, Lesson, Start, fit_start
from specdec.surplus.trust import Trust, fit_trust

TRUSTED = 4096
"""Validation contexts on which trust is fitted, at most."""
RECENT = 8
"""Weights are averaged over about the last 1 / (RECENT + 1) of all steps (Shamir and Zhang 2013, eta)."""

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(scores added to log r, log p, log r), each [n, M] -> a scalar to descend."""


def soft_cross_entropy(scores: Tensor, log_p: Tensor, log_r: Tensor) -> Tensor:
    """Mean over contexts, nats: E1's objective, and what every objective is stopped on."""
    return -(log_p.exp() * torch.log_softmax(log_r + scores, dim=-1)).sum(-1).mean()


@dataclass(frozen=True, slots=True)
class ProbeData:
    """What a probe may read.

    Attributes:
        ids: int64 [T].
        doc: int64 [T].
        features: [T, F], one tap set.
        labels: log p of any row.
        tokens: [V, e] frozen embedding of z's tokens.
        unembedding: [M, d] frozen U (identity for toys).
        donor: per depth an int64 [T]: the row whose feature is fed in place of row t (controls); absent = t.
        banks: controls that were fitted on this text and these labels.
        briefs: per depth the target run on z alone, where there is a target.
    """

    ids: Tensor
    doc: Tensor
    features: Tensor
    labels: Labels
    tokens: Tensor
    unembedding: Tensor
    donor: Mapping[int, Tensor] = field(default_factory=dict)
    banks: Banks = field(default_factory=Banks)
    briefs: Mapping[int, Brief] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not bool(torch.isfinite(self.features).all()):
            raise RequestError(
                "NaN or infinity in hidden states", field="features", remedy="Drop those documents"
            )

    def contexts(self, depth: int, among: Tensor) -> Contexts:
        """Contexts of `depth` whose row t is in the bool mask `among` [T]."""
        return contexts(self.ids, self.doc, depth, among)

    def inputs(self, where: Contexts) -> Tensor:
        """Features [n, F] of the contexts, donors applied."""
        rows = self.donor[where.depth][where.at] if where.depth in self.donor else where.at
        return self.features[rows].float()


def permuted(data: ProbeData, parts: tuple[Tensor, ...], depths: tuple[int, ...], seed: int) -> ProbeData:
    """The same data with h permuted within equal z, separately inside each bool mask [T] of `parts`."""
    generator = torch.Generator().manual_seed(seed)
    donor = {}
    for depth in depths:
        rows = torch.arange(data.ids.shape[0])
        for part in parts:
            where = data.contexts(depth, part)
            rows[where.at] = where.at[permute_within(where.z, data.doc[where.at], generator)]
        donor[depth] = rows
    return replace(data, donor=donor)


@dataclass(frozen=True, slots=True)
class ProbeSettings:
    """Shape and training of a probe; the defaults suit a GPU.

    Attributes:
        width: inner width of F.
        rank: output rank before U, at most 256 by design.
        token_width: width of each encoded z token.
        epochs, patience: at most `epochs`, stop after `patience` without a better validation value.
        batch: rows t per step; `block` neighbours stay together so that depths share label rows.
        rate, decay: of AdamW; the rate falls along a cosine.
        start: begin at the closed form instead of the control.
        seed: of weights and order.
    """

    width: int = 2048
    rank: int = 256
    token_width: int = 64
    epochs: int = 30
    patience: int = 4
    batch: int = 512
    block: int = 16
    rate: float = 2e-3
    decay: float = 1e-2
    start: bool = True
    seed: int = 0


class Probe(nn.Module):
    """U F([norm(h); enc(z)]) and the closed-form start: the logits added to the control's.

    `norm` divides by the root mean square, keeps its logarithm as one more feature (nothing is lost) and standardises
    every dimension by training statistics: residual streams carry dimensions a thousand times larger than others.
    """

    def __init__(self, data: ProbeData, train: Contexts, settings: ProbeSettings) -> None:
        super().__init__()
        slots = train.depth - 1
        self.tokens, self.unembedding = data.tokens.float(), data.unembedding.float()
        every = train.take(torch.arange(0, train.at.shape[0], 1 + train.at.shape[0] // 20000))
        sample = _spherical(data.inputs(every))
        self.centre, self.scale = sample.mean(0), sample.std(0).clamp_min(1e-6)
        spoken = self.tokens[every.z].flatten(1)
        self.mean, self.spread = spoken.mean(0), spoken.std(0).clamp_min(1e-6)
        self.start = Start()
        # One encoder per slot: x_{t+1} and x_{t+2} play different parts.
        shape = (slots, self.tokens.shape[1], settings.token_width)
        self.encode = nn.Parameter(torch.randn(shape) / math.sqrt(self.tokens.shape[1]))
        inner = sample.shape[1] + settings.token_width * slots
        self.body = nn.Sequential(
            nn.Linear(inner, settings.width), nn.GELU(), nn.Linear(settings.width, settings.rank)
        )
        self.last = nn.Linear(settings.rank, self.unembedding.shape[1], bias=False)
        nn.init.zeros_(self.last.weight)

    def begin(self, data: ProbeData, lesson: Lesson) -> None:
        """Fit the closed form, unless it would have too many inputs."""
        if self.centre.shape[0] + self.mean.shape[0] <= WIDEST:
            self.start = fit_start(lambda where: self._linear(data.inputs(where), where.z), lesson)

    def _linear(self, features: Tensor, z: Tensor) -> Tensor:
        state = (_spherical(features) - self.centre) / self.scale
        return torch.cat([state, (self.tokens[z].flatten(1) - self.mean) / self.spread], dim=-1)

    def forward(self, features: Tensor, z: Tensor) -> Tensor:
        """features [n, F], z int64 [n, k - 1] -> logits [n, M] to add to log r."""
        state = (_spherical(features) - self.centre) / self.scale
        codes = torch.einsum("nse,sew->nsw", self.tokens[z], self.encode).flatten(1)
        hidden: Tensor = self.last(self.body(torch.cat([state, codes], dim=-1)))
        start = self.start
        if start.weight is None or start.constant is None or start.bias is None:
            return hidden @ self.unembedding.T
        spoken = (self.tokens[z].flatten(1) - self.mean) / self.spread
        linear = torch.cat([state, spoken], dim=-1) @ start.weight + start.constant
        logits: Tensor = (hidden + linear) @ self.unembedding.T + start.bias
        return logits


def _spherical(features: Tensor) -> Tensor:
    rms = features.square().mean(-1, keepdim=True).add(1e-12).sqrt()
    return torch.cat([features / rms, rms.log()], dim=-1)


@dataclass(frozen=True, slots=True)
class Fitted:
    """A trained probe over its control.

    Attributes:
        probe: at its best epoch.
        control: r, whose log-probabilities are the starting logits.
        validation: mean soft cross-entropy there, trust included, nats.
        epochs: run until the stop.
        trust: how far contexts follow the probe; None follows it all the way.
    """

    probe: Probe
    control: Control
    validation: float
    epochs: int
    trust: Trust | None = None

    @torch.no_grad()
    def log_probs(self, data: ProbeData, where: Contexts) -> Tensor:
        """float32 log q [n, M]."""
        log_r = self.control.log_probs(where.z)
        log_q = torch.log_softmax(log_r + self.probe(data.inputs(where), where.z), dim=-1)
        return log_q if self.trust is None else self.trust.log_probs(log_r, log_q)


def trusted(fitted: Fitted, data: ProbeData, val: Contexts) -> Fitted:
    """The same probe with its last step, fitted on validation text, and kept where that text is told better by it."""
    some = val.take(torch.arange(0, val.at.shape[0], -(-val.at.shape[0] // TRUSTED)))
    log_p, log_r = data.labels.rows(some.label_row), fitted.control.log_probs(some.z)
    log_q = fitted.log_probs(data, some)
    trust = fit_trust(log_r, log_q, log_p)
    gain = float((log_p.exp() * (trust.log_probs(log_r, log_q) - log_q)).sum(-1).mean())
    return replace(fitted, trust=trust, validation=fitted.validation - gain) if gain > 0 else fitted


@dataclass(frozen=True, slots=True)
class Batch:
    """Contexts of one depth with their label law log p [n, M]."""

    where: Contexts
    log_p: Tensor


def walk_text(
    data: ProbeData, plan: Mapping[int, Contexts], settings: ProbeSettings, generator: torch.Generator | None
) -> Iterator[dict[int, Batch]]:
    """Visit every context of every depth once; label rows shared by several depths are computed once per
    batch.

    Args:
        plan: contexts per depth.
        generator: shuffles blocks of neighbouring rows; None keeps the text's order.
    """
    lookup = {}
    for depth, where in plan.items():
        table = torch.full((data.ids.shape[0],), -1, dtype=torch.int64)
        table[where.at] = torch.arange(where.at.shape[0])
        lookup[depth] = table
    starts = torch.unique(torch.cat([where.at for where in plan.values()]) // settings.block)
    if generator is not None:
        starts = starts[torch.randperm(starts.shape[0], generator=generator)]
    per = max(1, settings.batch // settings.block)
    for i in range(0, starts.shape[0], per):
        rows = (starts[i : i + per, None] * settings.block + torch.arange(settings.block)).flatten()
        rows = rows[rows < data.ids.shape[0]]
        found = {depth: table[rows] for depth, table in lookup.items()}
        parts = {depth: plan[depth].take(index[index >= 0]) for depth, index in found.items()}
        needed, slot = torch.unique(
            torch.cat([part.label_row for part in parts.values()]), return_inverse=True
        )
        laws, offset, ready = data.labels.rows(needed), 0, {}
        for depth, part in parts.items():
            mine = slot[offset : offset + part.at.shape[0]]
            offset += part.at.shape[0]
            if part.at.shape[0]:
                ready[depth] = Batch(part, laws[mine])
        yield ready


def fit_probes(
    data: ProbeData,
    train: Mapping[int, Contexts],
    val: Mapping[int, Contexts],
    controls: Mapping[int, Control],
    settings: ProbeSettings,
    objective: Objective = soft_cross_entropy,
) -> dict[int, Fitted]:
    """Train one probe per depth over its control, early-stopped each on its own validation cross-entropy.

    Raises:
        RequestError: a depth without training or validation contexts.
    """
    for name, plan in (("train", train), ("val", val)):
        for depth, where in plan.items():
            if not where.at.shape[0]:
                raise RequestError(
                    f"no {name} contexts", field="depth", value=depth, remedy="Longer documents"
                )
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(settings.seed)
    probes = {depth: Probe(data, where, settings) for depth, where in train.items()}
    torch.random.set_rng_state(torch_state)
    if settings.start:
        for depth, probe in probes.items():
            lesson = Lesson(train[depth], val[depth], data.labels, controls[depth], probe.unembedding)
            probe.begin(data, lesson)
    course = {depth: _Course(probe, controls[depth], objective) for depth, probe in probes.items()}
    _validate(data, val, course, settings)
    _train(data, train, val, course, settings)
    return {depth: trusted(each.result(), data, val[depth]) for depth, each in course.items()}


class _Course:
    """The mutable side of one depth's training: mean weights, the best of them so far and patience used."""

    def __init__(self, probe: Probe, control: Control, objective: Objective) -> None:
        self.probe, self.control, self.objective = probe, control, objective
        self.best, self.stale, self.epochs, self.steps = math.inf, -1, -1, 0
        self.mean = self.state = _copy(probe.state_dict())

    def loss(self, data: ProbeData, batch: Batch) -> Tensor:
        """The objective on a batch."""
        where, log_r = batch.where, self.control.log_probs(batch.where.z)
        return self.objective(self.probe(data.inputs(where), where.z), batch.log_p, log_r)

    @torch.no_grad()
    def value(self, data: ProbeData, batch: Batch) -> float:
        """Mean soft cross-entropy of a batch under the mean weights."""
        where, log_r = batch.where, self.control.log_probs(batch.where.z)
        scores = functional_call(self.probe, self.mean, (data.inputs(where), where.z))
        return float(soft_cross_entropy(scores, batch.log_p, log_r))

    @torch.no_grad()
    def stepped(self) -> None:
        """Move the mean towards the weights after a step."""
        self.steps += 1
        for name, weight in self.probe.state_dict().items():
            self.mean[name].lerp_(weight, (RECENT + 1) / (self.steps + RECENT))

    def note(self, score: float) -> None:
        """Record an epoch's validation value."""
        self.epochs += 1
        if score < self.best:
            self.best, self.stale = score, 0
            self.state = _copy(self.mean)
        else:
            self.stale += 1

    def result(self) -> Fitted:
        """The probe at its best epoch."""
        self.probe.load_state_dict(self.state)
        return Fitted(self.probe.eval(), self.control, self.best, self.epochs)


def _copy(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in weights.items()}


def _train(
    data: ProbeData,
    train: Mapping[int, Contexts],
    val: Mapping[int, Contexts],
    course: dict[int, _Course],
    settings: ProbeSettings,
) -> None:
    generator = torch.Generator().manual_seed(settings.seed)
    active = dict(course)
    weights = [p for each in course.values() for p in each.probe.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=settings.rate, weight_decay=settings.decay)
    for epoch in range(settings.epochs):
        plan = {depth: train[depth] for depth in active}
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * (
                0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * epoch / settings.epochs))
            )
        for batch in walk_text(data, plan, settings, generator):
            optimizer.zero_grad(set_to_none=True)
            # Depths share no weight, so one sum of losses is many independent trainings.
            loss: Tensor = torch.stack([active[k].loss(data, part) for k, part in batch.items()]).sum()
            torch.autograd.backward(loss)
            optimizer.step()
            for k in batch:
                active[k].stepped()
        _validate(data, {depth: val[depth] for depth in active}, active, settings)
        active = {depth: each for depth, each in active.items() if each.stale < settings.patience}
        if not active:
            return


def _validate(
    data: ProbeData, val: Mapping[int, Contexts], course: Mapping[int, _Course], settings: ProbeSettings
) -> None:
    sums = dict.fromkeys(val, 0.0)
    for batch in walk_text(data, val, settings, None):
        for depth, part in batch.items():
            sums[depth] += course[depth].value(data, part) * part.where.at.shape[0]
    for depth, where in val.items():
        course[depth].note(sums[depth] / where.at.shape[0])
