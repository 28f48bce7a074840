"""The learning curve of the gap: Delta(N) over growing training text, and its limit Delta_inf + a N^-b.

A gap measured on little text is mostly the probe's own ignorance; the limit says how much more text would buy.
Knows what `estimate` knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.errors import RequestError
from specdec.surplus.control import cross_entropies
from specdec.surplus.estimate import EstimateSettings, fit_bank, score_probe, split
from specdec.surplus.folds import Fold, make_folds
from specdec.surplus.interval import Interval, resamples
from specdec.surplus.probe import ProbeData, fit_probes


@dataclass(frozen=True, slots=True)
class Point:
    """One size of training text: contexts used, and the gap on the same test documents."""

    contexts: int
    gap: Interval


def learning_curve(
    data: ProbeData,
    position: Tensor,
    settings: EstimateSettings,
    *,
    fractions: Sequence[float] = (0.125, 0.25, 0.5, 1.0),
    seed: int = 0,
) -> dict[int, tuple[Point, ...]]:
    """Gap per depth on the first fold's test documents, for growing shares of its training documents."""
    fold = make_folds(data.doc, folds=settings.folds, seed=seed)[0]
    order = fold.train[torch.randperm(fold.train.shape[0], generator=torch.Generator().manual_seed(seed))]
    points: dict[int, list[Point]] = {k: [] for k in settings.depths}
    for share in fractions:
        count = max(1, round(share * order.shape[0]))
        parts = split(data, Fold(order[:count].sort().values, fold.val, fold.test), position, settings)
        controls = {k: fit_bank(data, parts, k, settings).best for k in settings.depths}
        for k, fitted in fit_probes(data, parts.train, parts.val, controls, settings.probe).items():
            crossed = cross_entropies(controls[k], parts.test[k], data.labels)
            rows = score_probe(fitted, data, parts.test[k], crossed)
            gap = resamples(rows.doc, minimum=2).mean(rows.gap)
            points[k].append(Point(parts.train[k].at.shape[0], gap))
    return {k: tuple(found) for k, found in points.items()}


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """value(N) = limit + scale * N^-exponent.

    Attributes:
        limit: value at infinite training text, nats.
        scale, exponent: of the decay; zero scale where the curve is flat.
        residual: root mean square misfit, nats.
    """

    limit: float
    scale: float
    exponent: float
    residual: float

    def at(self, n: float) -> float:
        """Predicted value at N."""
        return self.limit + self.scale * float(n**-self.exponent)


def fit_power_law(sizes: Sequence[float], values: Sequence[float]) -> PowerLaw:
    """Least squares over a grid of exponents, linear in the rest, with limit >= 0 and scale >= 0.

    >>> law = fit_power_law([1e3, 2e3, 4e3, 8e3], [0.3 + 2 * n**-0.5 for n in (1e3, 2e3, 4e3, 8e3)])
    >>> round(law.limit, 3), round(law.exponent, 2)
    (0.3, 0.5)

    Raises:
        RequestError: fewer than three sizes (two parameters and a check).
    """
    if len(sizes) < 3 or len(sizes) != len(values):
        raise RequestError(
            "a learning curve needs three sizes with one value each",
            field="sizes",
            value=len(sizes),
            allowed=">= 3",
        )
    n = torch.tensor(sizes, dtype=torch.float64)
    y = torch.tensor(values, dtype=torch.float64)
    trials = [_line(n, y, 0.05 * step) for step in range(1, 41)]
    best: PowerLaw = min(trials, key=_misfit)
    return best


def _misfit(law: PowerLaw) -> float:
    return law.residual


def _line(n: Tensor, y: Tensor, exponent: float) -> PowerLaw:
    x = n**-exponent
    spread = (x - x.mean()).square().sum()
    scale = ((x - x.mean()) * (y - y.mean())).sum() / spread
    limit = y.mean() - scale * x.mean()
    if limit < 0:
        limit, scale = torch.zeros(()), (x * y).sum() / x.square().sum()
    if scale < 0:
        limit, scale = y.mean(), torch.zeros(())
    misfit = float((limit + scale * x - y).square().mean().sqrt())
    return PowerLaw(float(limit), float(scale), exponent, misfit)
