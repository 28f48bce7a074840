"""How far each context follows its probe: log q' = log softmax(log r + s (log q - log r)), s between 0 and 1.

A probe trained on few rows spoils contexts in which the control r was right already. s is a sigmoid of what a drafter
sees of both laws, and its few weights are fitted on validation text: all of the probe and none of it are both within
reach, context by context. Knows tensors only. Dimension legend: n contexts, M label symbols, c cues.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 40
"""Of the quasi-Newton search; it stops by itself where nothing moves."""
PULL = 1e-3
"""On the squared weights of standardised cues, nats: validation text is short."""


@dataclass(frozen=True, slots=True)
class Trust:
    """A fitted share.

    Attributes:
        weight: [c + 1], a constant first.
        mean, spread: [c], of the cues on validation text.
    """

    weight: Tensor
    mean: Tensor
    spread: Tensor

    def share(self, log_r: Tensor, log_q: Tensor) -> Tensor:
        """s of each context: two laws [n, M] -> [n]."""
        cues = (_cues(log_r, log_q) - self.mean) / self.spread
        return torch.sigmoid(self.weight[0] + cues @ self.weight[1:])

    def log_probs(self, log_r: Tensor, log_q: Tensor) -> Tensor:
        """log q' [n, M]."""
        return follow(log_r, log_q, self.share(log_r, log_q))


def follow(log_r: Tensor, log_q: Tensor, share: Tensor) -> Tensor:
    """The law between two laws [n, M], by a share [n] of the way.

    >>> r, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    >>> follow(r, q, torch.tensor([0.5])).exp()
    tensor([[0.7500, 0.2500]])
    """
    return torch.log_softmax(log_r + share[:, None] * (log_q - log_r), dim=-1)


def fit_trust(log_r: Tensor, log_q: Tensor, log_p: Tensor) -> Trust:
    """Least soft cross-entropy on the rows given; all inputs [n, M]."""
    cues = _cues(log_r, log_q)
    mean, spread = cues.mean(0), cues.std(0, correction=0).clamp_min(1e-6)
    p = log_p.exp()
    weight = torch.zeros(1 + cues.shape[1], requires_grad=True)
    search = torch.optim.LBFGS([weight], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        crossed = -(p * Trust(weight, mean, spread).log_probs(log_r, log_q)).sum(-1).mean()
        value = crossed + PULL * weight[1:].square().sum()
        torch.autograd.backward(value)
        return value

    search.step(loss)  # type: ignore[no-untyped-call]
    return Trust(weight.detach(), mean, spread)


def _cues(log_r: Tensor, log_q: Tensor) -> Tensor:
    """Entropies of both laws, the control's best guess, and how far the probe is from it: [n, c]."""
    r, q = log_r.exp(), log_q.exp()
    return torch.stack(
        [-(r * log_r).sum(-1), -(q * log_q).sum(-1), r.max(-1).values, (q * (log_q - log_r)).sum(-1)], dim=1
    )
