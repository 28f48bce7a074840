"""Splitting by document: folds that rotate, and predictor documents apart from outcome documents.

Positions of one document share a topic, so a row-wise split leaks; a predictor and an outcome
from the same documents would be circular. Knows document and domain numbers only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.errors import RequestError

DOCUMENTS_PER_FOLD = 4
"""Fewer in a test part and its mean is one or two documents' mood."""


@dataclass(frozen=True, slots=True)
class Fold:
    """Document ids of one rotation: three disjoint int64 vectors."""

    train: Tensor
    val: Tensor
    test: Tensor


def among(doc: Tensor, documents: Tensor) -> Tensor:
    """bool [T]: rows whose document is one of `documents`."""
    return torch.isin(doc, documents)


def make_folds(
    doc: Tensor, *, folds: int = 5, seed: int = 0, domain: Tensor | None = None
) -> tuple[Fold, ...]:
    """Deal documents into `folds` parts; fold i tests on part i, stops on part i + 1, trains on the rest.

    Args:
        doc: int64 [T].
        folds: parts; 5 gives train 3 / val 1 / test 1.
        domain: optional int64 [T]; parts are then balanced over domains.

    Raises:
        RequestError: fewer than 3 folds, or too few documents; the message says how many are needed.
    """
    if folds < 3:
        raise RequestError("train, val and test need three parts", field="folds", value=folds, allowed=">= 3")
    present = _shuffled(doc, domain, seed)
    need = folds * DOCUMENTS_PER_FOLD
    if present.shape[0] < need:
        raise RequestError(
            f"too few documents for {folds} folds: {need} are needed",
            field="documents",
            value=present.shape[0],
            allowed=f">= {need}",
            remedy="Give more prompts, or fewer folds",
        )
    parts = [present[i::folds].sort().values for i in range(folds)]
    rotations = []
    for i in range(folds):
        stop = (i + 1) % folds
        rest = torch.cat([parts[j] for j in range(folds) if j not in (i, stop)]).sort().values
        rotations.append(Fold(rest, parts[stop], parts[i]))
    return tuple(rotations)


def split_roles(
    doc: Tensor, *, outcome: float = 0.5, seed: int = 0, domain: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Disjoint (predictor, outcome) document ids, balanced over domains.

    Args:
        outcome: share of documents whose acceptance is the outcome, in (0, 1).

    Raises:
        RequestError: a share outside (0, 1), or fewer than one document on a side.
    """
    if not 0 < outcome < 1:
        raise RequestError("not a share", field="outcome", value=outcome, allowed="between 0 and 1")
    present = _shuffled(doc, domain, seed)
    if present.shape[0] < 2:
        raise RequestError(
            "predictors and outcomes need different documents: 2 are needed",
            field="documents",
            value=present.shape[0],
            allowed=">= 2",
            remedy="Give more prompts",
        )
    # The fractional part of i * share jumps once per 1 / share documents: an even interleave, domain by
    # domain.
    steps = (torch.arange(present.shape[0] + 1, dtype=torch.float64) * outcome).floor()
    chosen = steps.diff() > 0
    if not bool(chosen.any()):
        chosen[-1] = True
    return present[~chosen].sort().values, present[chosen].sort().values


def _shuffled(doc: Tensor, domain: Tensor | None, seed: int) -> Tensor:
    """Unique documents in random order, grouped by domain: dealing them round robin balances domains."""
    present, inverse = torch.unique(doc, return_inverse=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(present.shape[0], generator=generator)
    if domain is not None:
        kind = torch.zeros_like(present)
        kind[inverse] = domain
        order = order[kind[order].argsort(stable=True)]
    ordered: Tensor = present[order]
    return ordered
