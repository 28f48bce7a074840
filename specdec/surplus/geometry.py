"""The pullback Fisher-Rao metric of the target's head (arXiv 2507.19247): which directions of a state change the
next-token law.

For logits W h, G(h) = W'(diag p - pp')W = Cov_{w~p}(W_w); through the final RMSNorm G_x = J'GJ and the radial
direction is null; at temperature T it is G(p_T) / T^2. Everything is computed from the factor
A = sqrt(p) (W_w - mu) [m, d] over the top m tokens, G = A'A, never from G itself. Raw eigenvalues of different models
do not compare: use the normalised figures (effective rank is not in the paper).
Dimension legend: n states, m tokens, d width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.surplus.contract import TargetHead


@dataclass(frozen=True, slots=True)
class Factor:
    """A with G = A'A, per state.

    Attributes:
        rows: float32 [n, m, d], sqrt(p_w) (W_w - mu) J / T, in the basis of the final state (before the
            norm).
        probs: float32 [n, m], top-m probabilities renormalised to one.
        mass: float32 [n], their mass before that; in flat laws well below one, and all figures are then those of the
            likeliest tokens alone.
    """

    rows: Tensor
    probs: Tensor
    mass: Tensor


def fisher_factor(head: TargetHead, final: Tensor, *, top: int = 512) -> Factor:
    """The factor of G at each state.

    Args:
        head: unembedding, norm, temperature.
        final: [n, d], input of the final norm; keep n * top * d small (chunk it).
        top: m, clipped to the vocabulary.
    """
    log_p = head.log_probs(final)
    kept = log_p.topk(min(top, log_p.shape[-1]), dim=-1)
    probs = kept.values.exp()
    mass = probs.sum(-1)
    probs = probs / mass[:, None]
    rows = head.unembedding.float()[kept.indices]
    mean = torch.einsum("nm,nmd->nd", probs, rows)
    rows = probs.sqrt()[..., None] * (rows - mean[:, None]) / head.temperature
    return Factor(pull_through_norm(head, final, rows), probs, mass)


def pull_through_norm(head: TargetHead, final: Tensor, rows: Tensor) -> Tensor:
    """rows [n, m, d] of the normed basis times J = diag(gamma)(I - xx'/(d rms^2)) / rms, rms with eps."""
    if head.norm_weight is None:
        return rows
    x = final.float()
    square = x.square().mean(-1) + head.eps
    scaled = rows * head.norm_weight.float()
    along = torch.einsum("nmd,nd->nm", scaled, x) / (x.shape[-1] * square)[:, None]
    return (scaled - along[..., None] * x[:, None]) / square.sqrt()[:, None, None]


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Shape of G at each state, [n] unless said otherwise.

    Attributes:
        values: [n, min(m, d)] eigenvalues, falling, divided by the trace.
        trace: tr G, the total sensitivity (not comparable across models).
        effective_rank: exp of the entropy of `values`.
        participation: (sum lambda)^2 / sum lambda^2.
        anisotropy: largest eigenvalue over the mean tr G / d; 1 is isotropic.
    """

    values: Tensor
    trace: Tensor
    effective_rank: Tensor
    participation: Tensor
    anisotropy: Tensor


def spectrum(factor: Factor) -> Spectrum:
    """Eigenvalues through the smaller Gram matrix, AA' [m, m] or A'A [d, d], in float64."""
    a = factor.rows.double()
    gram = a @ a.mT if a.shape[1] <= a.shape[2] else a.mT @ a
    raw = torch.linalg.eigvalsh(gram).flip(-1).clamp_min(0)
    trace = raw.sum(-1)
    values = raw / trace.clamp_min(1e-300)[:, None]
    entropy = -torch.special.xlogy(values, values).sum(-1)
    return Spectrum(
        values=values.float(),
        trace=trace.float(),
        effective_rank=entropy.exp().float(),
        participation=(1 / values.square().sum(-1).clamp_min(1e-300)).float(),
        anisotropy=(values[:, 0] * a.shape[2]).float(),
    )


@dataclass(frozen=True, slots=True)
class ErrorForecast:
    """What the metric says of a feature error e, and what is true, per state [n].

    Attributes:
        kl, tv: second- and first-order forecasts, 1/2 e'Ge (nats) and 1/2 E_p|<W_w - mu, J e>|.
        exact_kl, exact_tv: KL(p_h || p_{h+e}) and TV, by two softmaxes.
        share: log of e'Ge / (|e|^2 tr G / d); above 0 the error lies in predictive directions.
    """

    kl: Tensor
    tv: Tensor
    exact_kl: Tensor
    exact_tv: Tensor
    share: Tensor


def forecast(head: TargetHead, final: Tensor, error: Tensor, *, top: int = 512) -> ErrorForecast:
    """Forecast the cost of replacing final by final + error, both [n, d]."""
    factor = fisher_factor(head, final, top=top)
    moved = torch.einsum("nmd,nd->nm", factor.rows, error.float())
    quadratic = moved.square().sum(-1)
    trace = factor.rows.square().sum((1, 2))
    isotropic = error.float().square().sum(-1) * trace / error.shape[-1]
    log_p, log_q = head.log_probs(final), head.log_probs(final.float() + error.float())
    p = log_p.exp()
    return ErrorForecast(
        kl=quadratic / 2,
        tv=(factor.probs.sqrt() * moved.abs()).sum(-1) / 2,
        exact_kl=(p * (log_p - log_q)).sum(-1),
        exact_tv=(p - log_q.exp()).abs().sum(-1) / 2,
        share=(quadratic.clamp_min(1e-30) / isotropic.clamp_min(1e-30)).log(),
    )
