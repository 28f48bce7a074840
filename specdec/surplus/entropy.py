"""Categorical entropies of next-token kernels, and how far a draft's are from calibrated.

The categorical entropy of a kernel by a divergence D (arXiv 2507.19247; the families: Perrone 2212.11719): with D = KL
it is Shannon's (proposition 4.2), with D = TV 1 - sum p^2 (Gini-Simpson), with Renyi's D of order alpha the Renyi
entropy of order 2 - alpha. Cross-entropy splits into H(p) + KL(p || q); and E H(q) - E H(p) equals E KL exactly when
q is calibrated, so the residual is miscalibration (claim F5). Knows log-probabilities only: log p, log q [n, M],
natural logarithms, float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.errors import RequestError


def shannon(log_p: Tensor) -> Tensor:
    """H(p), nats: [n, M] -> [n]; zero-probability symbols add nothing."""
    return -(log_p.exp() * log_p.clamp_min(-1e4)).sum(-1)


def gini_simpson(log_p: Tensor) -> Tensor:
    """1 - sum p^2: [n]; sum p^2 is the acceptance of independent-sample matching at q = p."""
    return 1 - (2 * log_p).exp().sum(-1)


def renyi(log_p: Tensor, order: float) -> Tensor:
    """Renyi entropy H_order(p), nats: [n]; order 1 is Shannon. The D_alpha categorical entropy has order 2 -
    alpha.

    Raises:
        RequestError: a negative order.
    """
    if order < 0:
        raise RequestError("not an order", field="order", value=order, allowed=">= 0")
    if abs(order - 1) < 1e-6:
        return shannon(log_p)
    if order == 0:
        return (log_p > -80).sum(-1).float().log()
    return (order * log_p).logsumexp(-1) / (1 - order)


@dataclass(frozen=True, slots=True)
class Crossing:
    """Cross-entropy and its parts per row, nats [n]: cross = entropy + divergence."""

    cross: Tensor
    entropy: Tensor
    divergence: Tensor


def crossing(log_p: Tensor, log_q: Tensor) -> Crossing:
    """CE(p, q) = H(p) + KL(p || q)."""
    cross = -(log_p.exp() * log_q.clamp_min(-1e4)).sum(-1)
    entropy = shannon(log_p)
    return Crossing(cross, entropy, cross - entropy)


@dataclass(frozen=True, slots=True)
class Calibration:
    """How honest q is about p.

    Attributes:
        error: expected calibration error of max q against the p-mass of that token, in probability.
        temperature: T minimising E CE(p, q_T) on all rows; 1 is calibrated in this family, below 1 under-confident.
        divergence: E KL(p || q), nats.
        divergence_fixed: the same at that temperature, or at each half's other one.
        excess: E H(q) - E H(p), nats; the paper's remark says it is positive.
        residual: (E H(q_T) - E H(p)) - E KL(p || q_T), nats: what no temperature repairs.
    """

    error: float
    temperature: float
    divergence: float
    divergence_fixed: float
    excess: float
    residual: float


def calibration_error(confidence: Tensor, outcome: Tensor, bins: int = 15) -> float:
    """ECE over equal-count bins: sum of |mean outcome - mean confidence| weighted by rows.

    Args:
        confidence: [n] stated probability.
        outcome: [n] probability of the event (soft) or 0/1.
    """
    order = confidence.argsort()
    groups = [g for g in torch.tensor_split(order, bins) if g.numel()]
    total = sum(float((outcome[g] - confidence[g]).mean().abs()) * g.numel() for g in groups)
    return total / max(1, confidence.shape[0])


def heated(log_q: Tensor, temperature: float) -> Tensor:
    """log q_T, q_T proportional to q^(1/T)."""
    return torch.log_softmax(log_q / temperature, dim=-1)


def best_temperature(log_p: Tensor, log_q: Tensor, steps: int = 40) -> float:
    """T in [0.05, 20] minimising E CE(p, q_T), by golden section on log T: CE is convex in 1/T."""
    low, high = torch.tensor(0.05).log().item(), torch.tensor(20.0).log().item()
    golden = (5**0.5 - 1) / 2

    def loss(log_t: float) -> float:
        return float(crossing(log_p, heated(log_q, float(torch.tensor(log_t).exp()))).cross.mean())

    left, right = high - golden * (high - low), low + golden * (high - low)
    at_left, at_right = loss(left), loss(right)
    for _ in range(steps):
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - golden * (high - low)
            at_left = loss(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + golden * (high - low)
            at_right = loss(right)
        if high - low < 1e-3:
            break
    return float(torch.tensor((low + high) / 2).exp())


def calibrate(log_p: Tensor, log_q: Tensor, *, half: Tensor | None = None) -> Calibration:
    """Calibration of q.

    Args:
        half: optional bool [n], neither side empty; each side is then read at the temperature that suits the other,
            so that no row is tempered by what was fitted on itself.
    """
    temperature = best_temperature(log_p, log_q)
    fixed = heated(log_q, temperature)
    if half is not None:
        for side in (half, ~half):
            fixed[side] = heated(log_q[side], best_temperature(log_p[~side], log_q[~side]))
    raw, after = crossing(log_p, log_q), crossing(log_p, fixed)
    top = log_q.max(-1)
    mass = log_p.gather(1, top.indices[:, None])[:, 0].exp()
    return Calibration(
        error=calibration_error(top.values.exp(), mass),
        temperature=temperature,
        divergence=float(raw.divergence.mean()),
        divergence_fixed=float(after.divergence.mean()),
        excess=float((shannon(log_q) - raw.entropy).mean()),
        residual=float((shannon(fixed) - after.entropy - after.divergence).mean()),
    )
