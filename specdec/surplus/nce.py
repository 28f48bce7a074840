"""E2, the cross-check: the same critic trained by ranking noise-contrastive estimation, evaluated exactly.

Loss -log[e^f(y) / (e^f(y) + sum_j e^f(y_j))] with y_j drawn from the control and y of the target's own law, every
symbol by its weight; its own value saturates at log(K + 1) and is never quoted. The estimate is
S_nce = E[f(y) - log sum_y' r(y') e^f(y')], renormalised over every symbol: another lower bound relative to r, reached
by another loss (theory.md 2.3). Dimension legend: n contexts, M symbols, K negatives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.surplus.contract import Contexts
from specdec.surplus.control import Control, batches, cross_entropy
from specdec.surplus.interval import Interval
from specdec.surplus.labels import Labels
from specdec.surplus.probe import Batch, Fitted, Probe, ProbeData, ProbeSettings, trusted, walk_text
from specdec.surplus.start import Lesson


@dataclass(frozen=True, slots=True)
class NceSettings:
    """Negatives per context, over the probe's own settings.

    Attributes:
        negatives: K, 64 to 512; all symbols are scored anyway, so many cost little.
    """

    probe: ProbeSettings
    negatives: int = 512


def renormalised(scores: Tensor, log_p: Tensor, log_r: Tensor) -> Tensor:
    """E_p f - log sum r e^f for each context: scores, log_p, log_r [n, M] -> [n], nats.

    Equals CE(r) - CE(q) for q proportional to r e^f, hence comparable with E1 row by row.
    """
    return (log_p.exp() * scores).sum(-1) - (log_r + scores).logsumexp(-1)


def ranking_loss(
    scores: Tensor, log_p: Tensor, log_r: Tensor, settings: NceSettings, generator: torch.Generator
) -> Tensor:
    """Mean ranking loss of a batch, exact over positives; all inputs [n, M]."""
    draw = torch.multinomial(log_r.exp(), settings.negatives, replacement=True, generator=generator)
    negative = scores.gather(1, draw).logsumexp(-1, keepdim=True)
    return (log_p.exp() * (torch.logaddexp(scores, negative) - scores)).sum(-1).mean()


def fit_critic(
    data: ProbeData,
    train: Contexts,
    val: Contexts,
    control: Control,
    settings: NceSettings,
) -> Fitted:
    """Train a critic of the probe's shape by the ranking loss; stopped on the renormalised value.

    Its last step is E1's (`trust`): a step that only one of them had would be a difference that is not the loss's.
    """
    depth, recipe = train.depth, settings.probe
    state = torch.random.get_rng_state()
    torch.manual_seed(recipe.seed + 7919)  # another start than E1's, so that agreement means something
    critic = Probe(data, train, recipe)
    torch.random.set_rng_state(state)
    if recipe.start:
        critic.begin(data, Lesson(train, val, data.labels, control, critic.unembedding))
    optimizer = torch.optim.AdamW(critic.parameters(), lr=recipe.rate, weight_decay=recipe.decay)
    generator = torch.Generator().manual_seed(recipe.seed)
    best, kept, stale, epochs = _value(critic, data, val, control), _copy(critic), 0, 0
    for epoch in range(recipe.epochs):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * (0.02 + 0.49 * (1 + math.cos(math.pi * epoch / recipe.epochs)))
        for batch in walk_text(data, {depth: train}, recipe, generator):
            scores, log_r = _scores(critic, data, batch[depth], control)
            loss = ranking_loss(scores, batch[depth].log_p, log_r, settings, generator)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
        epochs += 1
        value = _value(critic, data, val, control)
        best, stale, kept = (value, 0, _copy(critic)) if value > best else (best, stale + 1, kept)
        if stale >= recipe.patience:
            break
    critic.load_state_dict(kept)
    return trusted(
        Fitted(critic.eval(), control, cross_entropy(control, val, data.labels) - best, epochs), data, val
    )


def _value(critic: Probe, data: ProbeData, where: Contexts, control: Control) -> float:
    return float(critic_values(Fitted(critic, control, math.nan, 0), data, where).mean())


def _scores(critic: Probe, data: ProbeData, batch: Batch, control: Control) -> tuple[Tensor, Tensor]:
    where = batch.where
    log_r = control.log_probs(where.z)
    return critic(data.inputs(where), where.z, log_r), log_r


def _copy(critic: Probe) -> Mapping[str, Tensor]:
    return {name: value.clone() for name, value in critic.state_dict().items()}


@torch.no_grad()
def critic_values(critic: Fitted, data: ProbeData, where: Contexts) -> Tensor:
    """S_nce of each context [n], nats; trust multiplies the scores."""
    parts = []
    labels: Labels = data.labels
    for rows in batches(where.at.shape[0], 2048):
        some = where.take(rows)
        log_p = labels.rows(some.label_row)
        scores, log_r = _scores(critic.probe, data, Batch(some, log_p), critic.control)
        if critic.trust is not None:
            scores = critic.trust.share(log_r, torch.log_softmax(log_r + scores, dim=-1))[:, None] * scores
        parts.append(renormalised(scores, log_p, log_r))
    return torch.cat(parts)


@dataclass(frozen=True, slots=True)
class Agreement:
    """E1 against E2 at one depth.

    Attributes:
        e1, e2: surplus by each, nats.
        allowed: max(0.03 nats, 5%) (theory.md 2.3).
    """

    e1: Interval
    e2: Interval
    allowed: float

    @property
    def holds(self) -> bool:
        """|E1 - E2| within what is allowed."""
        return abs(self.e1.value - self.e2.value) <= self.allowed


def agreement(e1: Interval, e2: Interval) -> Agreement:
    """Compare the two estimators."""
    return Agreement(e1, e2, max(0.03, 0.05 * abs(e1.value)))
