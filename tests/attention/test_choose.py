"""The start-up choice of a backend: right ones are timed, wrong and missing ones are told, the fastest wins."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.attention.choose import choose_attention
from specdec.attention.reference import ReferenceAttention
from specdec.cache import CacheShape
from specdec.errors import UnsupportedError
from specdec.native.library import library

SHAPE = CacheShape(4, 2, 16, torch.float32, torch.device("cpu"))


class Slow(ReferenceAttention):
    name = "slow"

    def attend(self, *given: Any, **more: Any) -> Tensor:
        time.sleep(0.02)
        return super().attend(*given, **more)


class Wrong(ReferenceAttention):
    name = "wrong"

    def attend(self, *given: Any, **more: Any) -> Tensor:
        return super().attend(*given, **more) * 1.1


class Sick(ReferenceAttention):
    name = "sick"

    def attend(self, *given: Any, **more: Any) -> Tensor:
        return super().attend(*given, **more) * torch.nan


class Missing(ReferenceAttention):
    name = "missing"

    def plan(self, *given: Any) -> Any:
        raise UnsupportedError("is not installed", field="flash_attn")


class Windowless(ReferenceAttention):
    name = "windowless"

    def plan(self, rows: Any, cache: Any, window: int | None) -> Any:
        if window is not None:
            raise UnsupportedError("knows no windows", field="window", value=window)
        return super().plan(rows, cache, window)


class Cached(ReferenceAttention):
    """Right the first times, and then faster than anything that computes."""

    name = "cached"

    def __init__(self) -> None:
        self.seen: Tensor | None = None

    def attend(self, *given: Any, **more: Any) -> Tensor:
        if self.seen is None:
            self.seen = super().attend(*given, **more)
        return self.seen


@pytest.mark.skipif(library() is None, reason="no C compiler")
def test_on_a_cpu_the_kernels_are_taken_wherever_they_fit() -> None:
    assert choose_attention(replace(SHAPE, head_dim=32), 6).attention.name == "native"
    choice = choose_attention(replace(SHAPE, head_dim=24), 6)
    assert choice.attention.name == "reference" and "divisible by 16" in choice.refused["native"]


def test_the_fastest_right_one_wins() -> None:
    choice = choose_attention(SHAPE, 6, makers=(Slow, Wrong, Cached, Sick, Missing))
    assert choice.attention.name == "cached"
    assert choice.milliseconds.keys() == {"reference", "slow", "cached"}
    assert choice.milliseconds["slow"] > 15
    assert choice.refused.keys() == {"wrong", "sick", "missing"}
    for words in (
        "cached (cached",
        "no wrong: differs from the reference by 1.0e-01",
        "no missing: flash_attn",
    ):
        assert words in choice.told()


@pytest.mark.parametrize(("windows", "taken"), [((None,), True), ((None, 8), False)])
def test_a_backend_must_take_every_window(windows: tuple[int | None, ...], taken: bool) -> None:
    choice = choose_attention(SHAPE, 6, windows, makers=(Windowless,))
    assert ("windowless" in choice.milliseconds) is taken
