"""`specdec generate --prompts FILE --slots N`: rows at once, each the answer that it has alone, in the file's order."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specdec.engine.engine import Engine

FAST = ["--dtype", "float32", "--device", "cpu", "--tree", "3/4/12", "--ignore-eos", "--max-tokens", "8"]
ROWS: list[dict[str, Any]] = [
    {"id": "talk", "turns": ["one one one", "two", "three"]},
    {"id": "long", "turns": ["word " * 5000, "more"]},
    *({"id": f"row {n}", "prompt": "abc" * n} for n in range(1, 8)),
]
Run = Callable[..., tuple[int, list[dict[str, Any]], str]]


@pytest.fixture
def run(specdec: Callable[..., tuple[int, str, str]], model: Path, tmp_path: Path) -> Run:
    """`specdec generate TARGET --prompts FILE --json WORDS`: the exit code, rows, and what was told."""
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def answer(*words: str) -> tuple[int, list[dict[str, Any]], str]:
        code, out, err = specdec("generate", model, *FAST, "--prompts", file, "--json", *words)
        return code, [json.loads(line) for line in out.splitlines()], err

    return answer


def test_rows_at_once_are_the_rows_one_by_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns see the answers before them, and the row that cannot be asked keeps no other from its answer."""
    code, alone, _ = run("--draft", "ngram")
    step, active = Engine.step, []
    monkeypatch.setattr(Engine, "step", lambda self: (step(self), active.append(len(self.active)))[0])
    again, together, err = run("--draft", "ngram", "--slots", "3")
    assert (code, again) == (2, 2), err
    told = ("id", "turn", "token_ids", "text", "finish_reason", "prompt_tokens")
    assert [[row[key] for key in told] for row in together] == [[row[key] for key in told] for row in alone]
    assert max(active) == 3
    assert "specdec generate: long: " in err


def test_ctrl_c_keeps_what_came_of_all_that_ran(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    step, steps = Engine.step, []

    def interrupted(self: Engine) -> Any:
        steps.append(1)
        if len(steps) == 12:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Engine, "step", interrupted)
    code, rows, _ = run("--plain", "--slots", "3")
    assert code == 130
    ends = {(row["id"], row["turn"]): row["finish_reason"] for row in rows}
    assert "cancelled" in ends.values()
    assert "length" in ends.values()
    assert ("row 7", 0) not in ends, "it had not begun"
    assert all(row["token_ids"] for row in rows if row["finish_reason"] == "cancelled")


def test_what_slots_cannot_be(
    specdec: Callable[..., tuple[int, str, str]], model: Path, tmp_path: Path
) -> None:
    (file := tmp_path / "p.jsonl").write_text('{"prompt": "x"}')
    for words in (["-p", "x", "--slots", "2"], ["--prompts", file, "--slots", "0"],
                  ["--prompts", file, "--slots", "2", "--show-tree"]):  # fmt: skip
        code, out, err = specdec("generate", model, *FAST, *words)
        assert (code, out) == (2, "")
        assert "slots: is out of range" in err


def test_texts_are_printed_whole(
    specdec: Callable[..., tuple[int, str, str]], model: Path, tmp_path: Path
) -> None:
    (file := tmp_path / "p.jsonl").write_text('{"prompt": "abc"}\n{"prompt": "abcabc"}\n')
    words = ["generate", model, *FAST, "--draft", "ngram", "--prompts", file]
    assert specdec(*words, "--slots", "2")[1] == specdec(*words)[1] != ""
