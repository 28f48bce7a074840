"""The README's table comes from one run: one machine, command and commit, every set of the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.readme import newest
from specdec.errors import SpecdecError

ARGV = ["specdec", "bench", "speed", "--prompts", "bench/prompts/chat.jsonl", "bench/prompts/qa.jsonl"]


def rows(commit: str, *sets: str) -> list[dict[str, Any]]:
    shared = {"machine": "m", "argv": ARGV, "commit": commit}
    return [
        {**shared, "set": name, "system": system} for name in sets for system in ("plain", "transformers")
    ]


def write(path: Path, *runs: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for run in runs for row in run))
    return path


def test_rows_of_other_commits_stay_out(tmp_path: Path) -> None:
    """The first rows of a run make its own later ones dirty; that is no other commit."""
    path = write(tmp_path / "speed.jsonl", rows("a", "chat", "qa"), rows("b", "chat"), rows("b-dirty", "qa"))
    assert {row["commit"] for row in newest(path)} == {"b", "b-dirty"}
    assert len(newest(path)) == 4


def test_a_run_that_lacks_a_set_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "speed.jsonl", rows("a", "chat", "qa"), rows("b", "chat"))
    with pytest.raises(SpecdecError, match="lacks qa"):
        newest(path)
