"""The learning rate's course and the clock of a run. Knows numbers only."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from training.sections import OptimizerSection


def rate(settings: OptimizerSection, progress: float) -> float:
    """Factor of the peak learning rate at a fraction of the run.

    >>> rate(OptimizerSection(warmup_fraction=0.5), 0.25)
    0.5
    """
    warm = settings.warmup_fraction
    if progress < warm:
        return progress / warm
    if settings.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warm) / max(1e-9, 1 - warm))))


@dataclass(slots=True)
class Clock:
    """Seconds that training has taken, over all its sittings.

    Attributes:
        before: seconds of earlier sittings.
        max_minutes: of training, None for no limit.
        now: a monotonic clock.
    """

    before: float = 0.0
    max_minutes: float | None = None
    now: Callable[[], float] = time.monotonic
    began: float = math.nan

    def __post_init__(self) -> None:
        self.began = self.now()

    @property
    def seconds(self) -> float:
        return self.before + self.now() - self.began

    @property
    def spent(self) -> float:
        """Fraction of the limit, 0 without one."""
        return 0.0 if self.max_minutes is None else self.seconds / (60 * self.max_minutes)
