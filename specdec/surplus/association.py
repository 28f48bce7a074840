"""How well one number tells another: rank correlations, fit without fitted parameters, and the baselines to
beat.

Functions of vectors; intervals come from `interval.bootstrap` over documents. Knows nothing of acceptance.
Dimension legend: n rows, c controls.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ranks(values: Tensor) -> Tensor:
    """Average ranks from 0, float64 [n]; ties share.

    >>> ranks(torch.tensor([3.0, 1.0, 3.0])).tolist()
    [1.5, 0.0, 1.5]
    """
    _, group, size = torch.unique(values, return_inverse=True, return_counts=True)
    last = size.cumsum(0).double()
    middle: Tensor = (last - (size.double() + 1) / 2)[group]
    return middle


def pearson(x: Tensor, y: Tensor) -> float:
    """Linear correlation; NaN where a side is constant."""
    a, b = x.double() - x.double().mean(), y.double() - y.double().mean()
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale > 0 else float("nan")


def spearman(x: Tensor, y: Tensor) -> float:
    """Rank correlation.

    >>> spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 4.0, 9.0]))
    1.0
    """
    return round(pearson(ranks(x), ranks(y)), 12)


def partial_spearman(x: Tensor, y: Tensor, given: Tensor) -> float:
    """Rank correlation of x and y after both ranks are regressed on the ranks of the controls [n, c]."""
    columns = [ranks(column) for column in given.T]
    design = torch.stack([torch.ones(x.shape[0], dtype=torch.float64), *columns], dim=1)
    design[:, 1:] -= design[:, 1:].mean(0)
    both = torch.stack([ranks(x), ranks(y)], dim=1)
    fitted = design @ torch.linalg.lstsq(design, both).solution
    rest = both - fitted
    # What is left of a side that the controls determine is rounding noise, not a correlation.
    if bool((rest.norm(dim=0) < 1e-8 * both.norm(dim=0)).any()):
        return float("nan")
    return pearson(rest[:, 0], rest[:, 1])


def kendall(x: Tensor, y: Tensor) -> float:
    """Kendall's tau-b; n^2 work, for rankings of tens of tap sets.

    >>> kendall(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 2.0])) == 1 / 3
    True
    """
    i, j = torch.triu_indices(x.shape[0], x.shape[0], offset=1)
    a, b = (x[i] - x[j]).double().sign(), (y[i] - y[j]).double().sign()
    scale = float((a.square().sum() * b.square().sum()).sqrt())
    return float((a * b).sum()) / scale if scale > 0 else float("nan")


def r_squared(predicted: Tensor, measured: Tensor) -> float:
    """1 - SSE / SST of the prediction as it stands: nothing is fitted, so it can be far below 0."""
    y = measured.double()
    total = float((y - y.mean()).square().sum())
    return 1 - float((y - predicted.double()).square().sum()) / total if total > 0 else float("nan")


def slope(predicted: Tensor, measured: Tensor) -> float:
    """Least-squares slope of measured on predicted; 1 is a faithful scale."""
    x = predicted.double() - predicted.double().mean()
    square = float(x.square().sum())
    return float(x @ measured.double()) / square if square > 0 else float("nan")


def mean_absolute_error(predicted: Tensor, measured: Tensor) -> float:
    """Mean |measured - predicted|."""
    return float((predicted.double() - measured.double()).abs().mean())


def auroc(confidence: Tensor, event: Tensor) -> float:
    """P(confidence of an event > that of a non-event), ties half; event is 0/1 [n]."""
    yes = event > 0.5
    positives, negatives = int(yes.sum()), int((~yes).sum())
    if not positives or not negatives:
        return float("nan")
    total = float(ranks(confidence)[yes].sum()) - positives * (positives - 1) / 2
    return total / (positives * negatives)


def affine_left_out(predictor: Tensor, measured: Tensor, group: Tensor) -> Tensor:
    """Baseline predictions: per group, an affine fit on all other groups (leave one domain out), [n]."""
    x = torch.stack([torch.ones_like(predictor, dtype=torch.float64), predictor.double()], dim=1)
    found = torch.empty(x.shape[0], dtype=torch.float64)
    for level in torch.unique(group).tolist():
        out = group == level
        weights = torch.linalg.lstsq(x[~out], measured.double()[~out, None]).solution
        found[out] = (x[out] @ weights)[:, 0]
    return found
