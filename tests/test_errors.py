"""Errors say which field, what was given, what is allowed and what to do."""

from __future__ import annotations

import pytest

from specdec import errors
from specdec.errors import SpecdecError


def test_docstring_example() -> None:
    error = SpecdecError("not a number", field="temperature", value="hot", allowed=">= 0")
    assert str(error) == "temperature: not a number (got 'hot'; allowed: >= 0)"
    assert (error.field, error.value, error.allowed, error.remedy) == ("temperature", "hot", ">= 0", None)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (SpecdecError("is empty"), "is empty"),
        (SpecdecError("is empty", field="prompt"), "prompt: is empty"),
        (SpecdecError("is empty", remedy="Say something."), "is empty. Say something."),
        (SpecdecError("is too low", value=0, remedy="Raise it."), "is too low (got 0). Raise it."),
        (SpecdecError("is unknown", allowed="a, b"), "is unknown (allowed: a, b)"),
    ],
)
def test_tells_what_it_knows(error: SpecdecError, text: str) -> None:
    assert str(error) == text


def test_long_values_are_cut() -> None:
    shown = str(SpecdecError("is long", value="x" * 500))
    assert shown.endswith("...)")
    assert len(shown) < 150
    assert str(SpecdecError("fits", value="x" * 118)).count("x") == 118


@pytest.mark.parametrize("name", ["RequestError", "CheckpointError", "MismatchError", "UnsupportedError"])
def test_kinds_are_caught_together(name: str) -> None:
    kind = getattr(errors, name)
    with pytest.raises(SpecdecError, match="field: wrong"):
        raise kind("wrong", field="field")
