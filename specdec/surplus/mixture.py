"""Controls with a library behind them: laws that the target gave for z alone, and mixtures with fitted controls.

Knows tensors and contexts; the target runs in `brief`. Dimension legend: u distinct z, n contexts, k depth, M label
symbols.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.surplus.contract import Contexts
from specdec.surplus.control import Control, context_keys, cross_entropy
from specdec.surplus.labels import Labels

WEIGHTS = (1.0, 0.9, 0.8, 0.65, 0.5, 0.35, 0.2, 0.1)
"""Shares of the target in its mixture with a fitted control; the best on validation text is taken."""


@dataclass(frozen=True, slots=True)
class Brief:
    """Laws after every z of one depth that the text holds.

    Attributes:
        keys: int64 [u] sorted, see `context_keys`.
        laws: log-laws of rows 0 ... u - 1.
    """

    keys: Tensor
    laws: Labels
    name: str = "target on z"

    def log_probs(self, z: Tensor) -> Tensor:
        """float32 log r [n, M]."""
        wanted = context_keys(z)
        at = torch.searchsorted(self.keys, wanted).clamp_max(len(self.keys) - 1)
        assert bool((self.keys[at] == wanted).all()), "a z that the text does not hold"
        return self.laws.rows(at)


@dataclass(frozen=True, slots=True)
class Mixed:
    """A share of one control and the rest of another: text has habits that a library has not."""

    first: Control
    second: Control
    share: float

    @property
    def name(self) -> str:
        """Of both."""
        return f"{self.first.name} and {self.second.name}"

    def log_probs(self, z: Tensor) -> Tensor:
        """float32 log r [n, M]."""
        first = self.first.log_probs(z) + torch.tensor(self.share).log()
        second = self.second.log_probs(z) + torch.tensor(max(1 - self.share, 1e-30)).log()
        return torch.logaddexp(first, second)


def mixed(brief: Brief, fitted: Control, val: Contexts, labels: Labels, *, rows: int = 4096) -> Mixed:
    """The mixture of the share that suits validation contexts best."""
    some = val.take(torch.arange(0, len(val.at), max(1, len(val.at) // rows)))
    found = [Mixed(brief, fitted, share) for share in WEIGHTS]
    return min(found, key=lambda one: cross_entropy(one, some, labels))
