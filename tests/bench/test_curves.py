"""Curves are drawn on the answers of somebody's training, which they leave alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import curves
from bench.record import append, file_for
from training.recipe import load_recipe
from training.store import Response, ResponseStore


def test_a_training_that_is_still_writing_is_not_disturbed(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    with ResponseStore(path, "print") as store:
        for name in ("a", "b"):
            store.append(Response(name, "", "", 0.0, (1, 2), tuple(range(3, 9)), "stop", 0))
    with path.open("ab") as file:
        file.write(b'{"id": "half a li')
    before = path.read_bytes()
    loaded: Any = SimpleNamespace(target=SimpleNamespace(info=SimpleNamespace(fingerprint="print")))
    texts = curves._texts(path, loaded, load_recipe("cpu"), 100)
    assert len(texts.train) == 2 and path.read_bytes() == before


def test_what_was_drawn_is_looked_for_where_it_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECDEC_RESULTS", str(tmp_path / "mine"))
    append("curves", [{"tokens": 5, "overrides": ["unroll.steps=1"]}])
    assert curves._known(file_for("curves"), {"tokens": 5}) == {'["unroll.steps=1"]'}
