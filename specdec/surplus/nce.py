"""E2, the cross-check: the same critic trained by ranking noise-contrastive estimation, evaluated exactly.

Loss -log[e^f(y) / (e^f(y) + sum_j e^f(y_j))] with y_j drawn from the control and y of the target's own law, every
symbol by its weight; its own value saturates at log(K + 1) and is never quoted. The estimate is
S_nce = E[f(y) - log sum_y' r(y') e^f(y')], renormalised over every symbol: another lower bound relative to r, reached
by another loss. Dimension legend: n contexts, M symbols, K negatives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specdec.surplus.contract import Contexts
from specdec.surplus.control import Control, batches
from specdec.surplus.interval import Interval
from specdec.surplus.labels import Labels
from specdec.surplus.probe import Fitted, ProbeData, ProbeSettings, fit_probes


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
    """Train a critic of the probe's shape by the ranking loss, from another start than E1's and stopped as E1 is.

    Its last step is E1's too (`trust`): a step that only one of them had would be a difference that is not the loss's.
    """
    recipe = replace(settings.probe, seed=settings.probe.seed + 7919)
    generator = torch.Generator().manual_seed(recipe.seed)

    def ranked(scores: Tensor, log_p: Tensor, log_r: Tensor) -> Tensor:
        return ranking_loss(scores, log_p, log_r, settings, generator)

    depth = train.depth
    return fit_probes(data, {depth: train}, {depth: val}, {depth: control}, recipe, ranked)[depth]


@torch.no_grad()
def critic_values(critic: Fitted, data: ProbeData, where: Contexts) -> Tensor:
    """S_nce of each context [n], nats; trust multiplies the scores."""
    parts = []
    labels: Labels = data.labels
    for rows in batches(where.at.shape[0], 2048):
        some = where.take(rows)
        log_p = labels.rows(some.label_row)
        log_r = critic.control.log_probs(some.z)
        scores = critic.probe(data.inputs(some), some.z)
        if critic.trust is not None:
            scores = critic.trust.share(log_r, torch.log_softmax(log_r + scores, dim=-1))[:, None] * scores
        parts.append(renormalised(scores, log_p, log_r))
    return torch.cat(parts)


@dataclass(frozen=True, slots=True)
class Agreement:
    """E1 against E2 at one depth.

    Attributes:
        e1, e2: surplus by each, nats.
        allowed: max(0.03 nats, 5%).
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
