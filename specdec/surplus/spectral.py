"""Predictive similarity of states, and how well tap features align with it: for ranking taps, never for nats.

Kernels between next-token laws and the Dirichlet energy of features on that graph are of arXiv 2507.19247, section 7
(theorem 7.6 ties the loss to the leading eigenspaces); canonical correlations between features and expected output
prototypes, partialled on the next token, are what its later, conditional statement amounts to. On a lag-copy
source the Gaussian formula turns such correlations into 32 nats where the truth is 2.85: hence no information
is returned here.
Dimension legend: n states, M symbols, F features, g prototype width, c width of what is partialled out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.errors import RequestError


def bhattacharyya(log_p: Tensor) -> Tensor:
    """sum sqrt(p p'): [n, M] -> [n, n], 1 on the diagonal."""
    root = (log_p / 2).exp()
    return root @ root.T


def hellinger(log_p: Tensor, beta: float = 4.0) -> Tensor:
    """exp(-beta H^2), H^2 = 1 - Bhattacharyya: a Gaussian in Hellinger distance, [n, n]."""
    distance: Tensor = (1 - bhattacharyya(log_p)).clamp_min(0)
    kernel: Tensor = (-beta * distance).exp()
    return kernel


def dirichlet_energy(features: Tensor, kernel: Tensor) -> float:
    """Smoothness of features on the graph: mean K |f - f'|^2 over mean |f - f'|^2 times mean K, off the
    diagonal.

    1 means no relation, below 1 means similar laws have similar features; scale-free, so taps compare.

    Args:
        features: [n, F]; standardised inside, since raw widths differ by orders of magnitude.
        kernel: [n, n] similarity.
    """
    wide = features.double()
    wide = (wide - wide.mean(0)) / wide.std(0).clamp_min(1e-12)
    square = torch.cdist(wide, wide).square()
    apart = ~torch.eye(wide.shape[0], dtype=torch.bool)
    weight = kernel.double()[apart]
    distance = square[apart]
    return float((weight * distance).mean() / (distance.mean() * weight.mean()))


@dataclass(frozen=True, slots=True)
class Moments:
    """Streaming sums of features x, prototypes y and conditioning c: joint second moments, float64.

    Attributes:
        count: rows seen.
        total: [F + g + c] sums.
        outer: [F + g + c, F + g + c] sums of products.
        widths: (F, g, c).
    """

    count: int
    total: Tensor
    outer: Tensor
    widths: tuple[int, int, int]


def no_moments(features: int, prototypes: int, given: int) -> Moments:
    """Nothing seen yet."""
    width = features + prototypes + given
    total = torch.zeros(width, dtype=torch.float64)
    return Moments(0, total, torch.zeros(width, width, dtype=torch.float64), (features, prototypes, given))


def add_moments(so_far: Moments, features: Tensor, prototypes: Tensor, given: Tensor) -> Moments:
    """Add n rows: features [n, F], prototypes [n, g] (E_p of output vectors), given [n, c] (e(x_{t+1}))."""
    rows = torch.cat([features.double(), prototypes.double(), given.double()], dim=-1)
    if tuple(part.shape[1] for part in (features, prototypes, given)) != so_far.widths:
        raise RequestError("widths changed between chunks", field="features", allowed=str(so_far.widths))
    return Moments(
        so_far.count + rows.shape[0], so_far.total + rows.sum(0), so_far.outer + rows.T @ rows, so_far.widths
    )


def partial_correlations(moments: Moments, *, ridge: float = 1e-3) -> Tensor:
    """Canonical correlations of features and prototypes given c, float64 [min(F, g)], falling, in [0, 1].

    Args:
        ridge: shrinkage of each covariance, in units of its mean diagonal; too little and noise correlates.

    Raises:
        RequestError: fewer rows than dimensions, where correlations are 1 by counting.
    """
    if moments.count <= sum(moments.widths):
        raise RequestError(
            f"too few rows for correlations: more than {sum(moments.widths)} are needed",
            field="rows",
            value=moments.count,
        )
    mean = moments.total / moments.count
    joint = moments.outer / moments.count - torch.outer(mean, mean)
    f, g, _ = moments.widths
    both, given = joint[: f + g, : f + g], joint[f + g :, f + g :]
    cross = joint[: f + g, f + g :]
    left = both - cross @ torch.linalg.solve(_shrunk(given, ridge), cross.T)
    x, y = _inverse_root(_shrunk(left[:f, :f], ridge)), _inverse_root(_shrunk(left[f:, f:], ridge))
    found: Tensor = torch.linalg.svdvals(x @ left[:f, f:] @ y)
    return found.clamp(0, 1)


def predictive_alignment(correlations: Tensor) -> float:
    """Sum of squared canonical correlations: a ranking score for tap sets (dimensionless, not nats)."""
    return float(correlations.square().sum())


def _shrunk(covariance: Tensor, ridge: float) -> Tensor:
    width = covariance.shape[0]
    return covariance + ridge * covariance.diagonal().mean() * torch.eye(width, dtype=covariance.dtype)


def _inverse_root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * values.clamp_min(1e-300).rsqrt()) @ vectors.T
    return root
