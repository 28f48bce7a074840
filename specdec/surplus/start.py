"""Where a probe starts: a ridge regression, on state and tokens, of what the label's logits have beyond the control's.

    log q0 = log softmax(log r + g U y + b),    y = closed-form linear map of [norm(h); e(z)]

A state holds most of what a draft can use in linear form, and a closed form finds it on a few thousand rows where
gradient steps do not. Ridge and gate g are chosen on validation text; g = 0 is the control itself and among the
choices, so ignoring h stays within reach. Frozen afterwards: what the probe learns comes on top.
Knows tensors only. Dimension legend: n rows, I inputs, d width of U, M label symbols.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.surplus.contract import Contexts
from specdec.surplus.control import CHUNK, Control, batches
from specdec.surplus.labels import Labels

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Of the mean diagonal; inputs are standardised."""
GATES = (0.25, 0.5, 0.75, 1.0)
SAMPLE = 1024
"""Rows on which marginals are matched and choices compared."""
WIDEST = 8192
"""Inputs beyond which the normal equations cost more than they give; the probe then starts at the control."""

Inputs = Callable[[Contexts], Tensor]
"""Contexts [n] -> standardised float32 [n, I]."""


@dataclass(frozen=True, slots=True)
class Start:
    """A linear reader of state and tokens.

    Attributes:
        gate: g; 0 is the control.
        weight: [I, d], the gate multiplied in; None at g = 0.
        constant: [d], likewise.
        bias: [M], matches the mean law of training text.
    """

    gate: float = 0.0
    weight: Tensor | None = None
    constant: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a start is fitted on."""

    train: Contexts
    val: Contexts
    labels: Labels
    control: Control
    unembedding: Tensor


@torch.no_grad()
def fit_start(inputs: Inputs, lesson: Lesson) -> Start:
    """Solve, and choose ridge and gate by soft cross-entropy on validation rows."""
    inner, cross, x_mean, y_mean = _moments(inputs, lesson)
    train, val = (_rows(inputs, lesson, part) for part in (lesson.train, lesson.val))
    best, found = val.cross_entropy(val.control), Start()
    for ridge in RIDGES:
        factor = torch.linalg.cholesky(inner + ridge * torch.eye(inner.shape[0]))
        weight = torch.cholesky_solve(cross, factor)
        constant = y_mean - x_mean @ weight
        seen, held = ((rows.inputs @ weight + constant) @ lesson.unembedding.T for rows in (train, val))
        for gate in GATES:
            bias = _match(train.control + gate * seen, train.probs)
            value = val.cross_entropy(val.control + gate * held + bias)
            if value < best:
                best, found = value, Start(gate, gate * weight, gate * constant, bias)
    return found


@dataclass(frozen=True, slots=True)
class _Rows:
    inputs: Tensor
    probs: Tensor
    control: Tensor

    def cross_entropy(self, logits: Tensor) -> float:
        return float(-(self.probs * torch.log_softmax(logits, dim=-1)).sum(-1).mean())


def _rows(inputs: Inputs, lesson: Lesson, part: Contexts) -> _Rows:
    every = max(1, part.at.shape[0] // SAMPLE)
    some = part.take(torch.arange(0, part.at.shape[0], every))
    return _Rows(inputs(some), lesson.labels.rows(some.label_row).exp(), lesson.control.log_probs(some.z))


def _match(logits: Tensor, probs: Tensor) -> Tensor:
    """A bias per symbol under which the mean law is that of the text, by a few rounds of proportional fitting."""
    goal, bias = (probs.mean(0) + 1e-6).log(), torch.zeros(logits.shape[1])
    for _ in range(3):
        bias = bias + goal - (torch.log_softmax(logits + bias, dim=-1).exp().mean(0) + 1e-6).log()
    return bias


def _moments(inputs: Inputs, lesson: Lesson) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Covariances [I, I] and [I, d] and means of inputs and of the states whose logits lead from control to labels."""
    centred = lesson.unembedding - lesson.unembedding.mean(0)
    gram = centred.T @ centred
    solver = torch.linalg.solve(gram + 1e-4 * gram.diagonal().mean() * torch.eye(len(gram)), centred.T).T
    inner = cross = x_sum = y_sum = torch.zeros(())
    for rows in batches(lesson.train.at.shape[0], CHUNK):
        some = lesson.train.take(rows)
        x, log_p = inputs(some), lesson.labels.rows(some.label_row).clamp_min(-30.0)
        beyond = log_p - lesson.control.log_probs(some.z).clamp_min(-30.0)
        y = (beyond - beyond.mean(-1, keepdim=True)) @ solver
        inner, cross = inner + x.T @ x, cross + x.T @ y
        x_sum, y_sum = x_sum + x.sum(0), y_sum + y.sum(0)
    n = lesson.train.at.shape[0]
    x_mean, y_mean = x_sum / n, y_sum / n
    return inner / n - torch.outer(x_mean, x_mean), cross / n - torch.outer(x_mean, y_mean), x_mean, y_mean
