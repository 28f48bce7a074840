"""Numbers with intervals: the bootstrap over documents that every table of the report uses.

Resampling tokens would pretend that a document's positions are independent; only documents are resampled.
Knows neither probes nor acceptance. Dimension legend: n rows, D documents, B resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.errors import RequestError

MIN_DOCUMENTS = 8
"""Below this a percentile bootstrap is a guess: with D documents the resampled mean takes few values."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and its 95% interval, in the unit of the value.

    Attributes:
        value: the estimate on all rows.
        low, high: 2.5% and 97.5% points over document resamples, widened by `widen` where asked.
        n: rows it rests on.
        documents: independent documents it rests on.
    """

    value: float
    low: float
    high: float
    n: int
    documents: int

    @property
    def standard_error(self) -> float:
        """Half the interval's width over 1.96."""
        return (self.high - self.low) / 3.92

    def widen(self, spread: float) -> Interval:
        """Add an independent standard deviation `spread` (seeds, folds) in quadrature, each side."""
        extra = 1.96 * spread
        low = self.value - ((self.value - self.low) ** 2 + extra**2) ** 0.5
        high = self.value + ((self.high - self.value) ** 2 + extra**2) ** 0.5
        return Interval(self.value, low, high, self.n, self.documents)


@dataclass(frozen=True, slots=True)
class Resamples:
    """Bootstrap weights over documents, drawn once so that comparisons are paired.

    Attributes:
        group: int64 [n], 0..D-1, the document of each row.
        weights: float64 [B, D], how often each document is drawn.
    """

    group: Tensor
    weights: Tensor

    @property
    def documents(self) -> int:
        """D."""
        return self.weights.shape[1]

    def totals(self, values: Tensor) -> Tensor:
        """Sum of `values` [n] per document: float64 [D]."""
        sums = torch.zeros(self.documents, dtype=torch.float64)
        return sums.index_add_(0, self.group, values.double())

    def means(self, values: Tensor) -> Tensor:
        """Mean of `values` [n] in each resample: float64 [B]."""
        counts = self.weights @ self.totals(torch.ones_like(values, dtype=torch.float64))
        return (self.weights @ self.totals(values)) / counts

    def mean(self, values: Tensor) -> Interval:
        """Mean of `values` [n] with its interval."""
        return self._interval(float(values.double().mean()), self.means(values))

    def ratio(self, above: Tensor, below: Tensor) -> Interval:
        """mean(above) / mean(below), both [n], resampled together."""
        value = float(above.double().mean() / below.double().mean())
        return self._interval(value, self.means(above) / self.means(below))

    def _interval(self, value: float, draws: Tensor) -> Interval:
        low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return Interval(value, low, high, self.group.shape[0], self.documents)


def resamples(doc: Tensor, *, draws: int = 1000, seed: int = 0, minimum: int = MIN_DOCUMENTS) -> Resamples:
    """Draw `draws` resamples of the documents present in `doc` [n].

    Raises:
        RequestError: fewer than `minimum` documents; the message says how many are needed.
    """
    present, group = torch.unique(doc.cpu(), return_inverse=True)
    count = present.shape[0]
    if count < minimum:
        raise RequestError(
            f"too few documents for an interval: {minimum} are needed",
            field="documents",
            value=count,
            allowed=f">= {minimum}",
            remedy="Capture more documents, or merge domains or bins",
        )
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(count, (draws, count), generator=generator)
    weights = torch.zeros(draws, count, dtype=torch.float64)
    weights.scatter_add_(1, picks, torch.ones_like(picks, dtype=torch.float64))
    return Resamples(group, weights)


def bootstrap(
    doc: Tensor,
    statistic: Callable[[Tensor], float],
    *,
    draws: int = 200,
    seed: int = 0,
    minimum: int = MIN_DOCUMENTS,
) -> Interval:
    """Interval of any statistic of rows, by resampling documents and concatenating their rows.

    Args:
        doc: int64 [n].
        statistic: maps row indices [m] to a number; called draws + 1 times. NaN draws are left out.
    """
    drawn = resamples(doc, draws=draws, seed=seed, minimum=minimum)
    order = drawn.group.argsort(stable=True)
    sizes = torch.bincount(drawn.group, minlength=drawn.documents)
    rows_of = torch.split(order, sizes.tolist())
    values = []
    for weight in drawn.weights:
        times = weight.long()
        rows = torch.cat([rows_of[i].repeat(int(times[i])) for i in times.nonzero()[:, 0].tolist()])
        values.append(statistic(rows))
    found = torch.tensor([v for v in values if v == v], dtype=torch.float64)
    whole = statistic(torch.arange(doc.shape[0]))
    if not found.numel():
        return Interval(whole, float("nan"), float("nan"), doc.shape[0], drawn.documents)
    low, high = found.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(whole, low, high, doc.shape[0], drawn.documents)
