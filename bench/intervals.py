"""Rates and ratios of rates over the same prompts, with 95% bootstrap intervals. Knows only tokens and seconds."""

from __future__ import annotations

import random
from collections.abc import Sequence

RESAMPLES = 1000
SEED = 0

Timed = tuple[float, float]
"""Tokens and the seconds they took, of one prompt."""


def interval(ours: Sequence[Timed], base: Sequence[Timed], *, ratio: bool) -> tuple[float, list[float]]:
    """Tokens per second over all prompts, or with `ratio` their quotient over `base`, and its interval.

    Prompts are drawn again with replacement, each with both of its times, so that what makes a prompt slow for both
    does not widen the interval of the ratio.
    """

    def value(pick: Sequence[int]) -> float:
        rate = sum(ours[i][0] for i in pick) / sum(ours[i][1] for i in pick)
        return rate / (sum(base[i][0] for i in pick) / sum(base[i][1] for i in pick)) if ratio else rate

    everyone = range(len(ours))
    dice = random.Random(SEED)
    draws = sorted(value(dice.choices(everyone, k=len(ours))) for _ in range(RESAMPLES))
    low, high = draws[int(0.025 * RESAMPLES)], draws[int(0.975 * RESAMPLES) - 1]
    return round(value(everyone), 3), [round(low, 3), round(high, 3)]
