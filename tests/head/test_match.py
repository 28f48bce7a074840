"""A head and a target that do not belong together are refused by the first field that differs."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from specdec.errors import MismatchError
from specdec.head.config import HeadConfig
from specdec.head.match import check_match

CONFIG = HeadConfig(
    hidden=16,
    target_hidden=16,
    taps=(2, 4, 8),
    intermediate=8,
    heads=2,
    kv_heads=1,
    head_dim=8,
    vocab=12,
    draft_vocab=6,
    fingerprint="a",
)
TARGET: dict[str, Any] = {"vocab": 12, "hidden": 16, "layers": 8, "fingerprint": "a", "name": "tiny"}


def test_a_head_of_this_target_passes_with_and_without_a_fingerprint() -> None:
    check_match(CONFIG, SimpleNamespace(**TARGET))
    check_match(replace(CONFIG, fingerprint=None), SimpleNamespace(**TARGET))


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("vocab", 13, "vocab"),
        ("hidden", 32, "hidden"),
        ("layers", 7, "taps"),
        ("fingerprint", "b", "fingerprint"),
    ],
)
def test_what_differs_is_named(field: str, value: Any, named: str) -> None:
    with pytest.raises(MismatchError, match=f"^{named}:.*tiny") as caught:
        check_match(CONFIG, SimpleNamespace(**(TARGET | {field: value})))
    assert caught.value.field == named
