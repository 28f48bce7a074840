"""E3, dose and response: surplus must rise with the window the state was computed from and fall with noise added.

No learned map can fake both curves, and the noise curve is the rigorous answer to injectivity: I(h + sigma xi; x) is
finite and ranks layers where I(h; x) cannot. How states are recomputed and how a surplus is estimated come in as
callables: nothing here knows a target or a probe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from specdec.errors import RequestError
from specdec.surplus.interval import Interval

Recompute = Callable[[int], Tensor]
"""w -> features [T, F] computed from the last w tokens only."""
Estimator = Callable[[Tensor], Interval]
"""features [T, F] -> surplus with interval, nats."""


@dataclass(frozen=True, slots=True)
class DoseCurve:
    """Surplus against a dose.

    Attributes:
        name: "window" (tokens) or "noise" (units of the features' own standard deviation).
        doses: increasing.
        surplus: one interval per dose, nats.
        rising: the direction theory demands.
    """

    name: str
    doses: tuple[float, ...]
    surplus: tuple[Interval, ...]
    rising: bool

    @property
    def violations(self) -> tuple[int, ...]:
        """Steps i -> i + 1 that move the wrong way by more than both intervals allow."""
        sign = 1 if self.rising else -1
        wrong = []
        for i, (a, b) in enumerate(pairwise(self.surplus)):
            slack = 1.96 * (a.standard_error**2 + b.standard_error**2) ** 0.5
            if sign * (b.value - a.value) < -slack:
                wrong.append(i)
        return tuple(wrong)

    @property
    def holds(self) -> bool:
        """Monotone within intervals, and the far end on the right side of the near one."""
        ends = self.surplus[-1].value - self.surplus[0].value
        return not self.violations and (ends >= 0 if self.rising else ends <= 0)


def window_response(recompute: Recompute, windows: Sequence[int], estimate: Estimator) -> DoseCurve:
    """Surplus of states that saw only the last w tokens.

    Raises:
        RequestError: fewer than two windows, not increasing, or one below 1.
    """
    _increasing("windows", windows, 1)
    found = tuple(estimate(recompute(window)) for window in windows)
    return DoseCurve("window", tuple(map(float, windows)), found, rising=True)


def noise_response(
    features: Tensor, sigmas: Sequence[float], estimate: Estimator, *, seed: int = 0
) -> DoseCurve:
    """Surplus of h + sigma * std * xi, the same xi at every sigma.

    Args:
        features: [T, F].
        sigmas: in units of each feature's standard deviation; set one to the draft's measured feature error.

    Raises:
        RequestError: fewer than two sigmas, not increasing, or one below 0.
    """
    _increasing("sigmas", sigmas, 0)
    wide = features.float()
    xi = torch.randn(wide.shape, generator=torch.Generator().manual_seed(seed)) * wide.std(0)
    found = tuple(estimate(wide + sigma * xi) for sigma in sigmas)
    return DoseCurve("noise", tuple(map(float, sigmas)), found, rising=False)


def _increasing(field: str, doses: Sequence[float], least: float) -> None:
    steps = all(b > a for a, b in pairwise(doses))
    if len(doses) < 2 or not steps or doses[0] < least:
        raise RequestError(
            "a dose curve needs at least two increasing doses",
            field=field,
            value=list(doses),
            allowed=f">= {least}, increasing",
        )
