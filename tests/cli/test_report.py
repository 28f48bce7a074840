"""`specdec report`: refusals before the work, a plan from two files, comparisons, and the self-check's exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import engines
import pytest
from rich.console import Console
from tiny_report import TINY_PLAN

from specdec.cli.passages import passages_of
from specdec.cli.prompts import Dialogue
from specdec.surplus import controls, plan
from specdec.surplus.controls import Check
from specdec.surplus.write import VERSION
from specdec.target.load import load_target

Report = Callable[..., tuple[int, str, str]]


def prompts(path: Path, count: int) -> str:
    rows = [{"id": f"q{i}", "prompt": f"tell me {i} {path.stem}"} for i in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def report(specdec: Report) -> Report:
    return lambda *words: specdec("report", *words)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--budget quick` is the tests' own plan."""
    monkeypatch.setitem(plan.BUDGETS, "quick", TINY_PLAN)


def test_a_plan_report_from_the_command_line(
    small: None, report: Report, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [prompts(tmp_path / f"{name}.jsonl", 25) for name in ("songs", "maths")]
    out = tmp_path / "out"
    words = ("--target", model, "--prompts", *files, "--out", out, "--taps", "1,4,6", "--taps", "8", "--json")
    code, printed, told = report(*words)
    assert code == 0, told
    values = json.loads(printed)
    assert values["kind"] == "plan"
    assert values["domain_names"] == ["songs", "maths"]
    assert str(tmp_path) not in values["told"]["command"].replace(str(model), "")
    for options in ("--taps 1,4,6 --taps 8", "--dtype float32 --device cpu"):
        assert options in values["told"]["command"]
    assert "tap sets" in told
    assert "claims" in told
    assert (out / "report.html").is_file()
    assert not (tmp_path / "out.work").exists()
    _refused(report(*words), "exists already")
    code, printed, _ = report("--compare", out, out / "report.json")
    assert code == 0 and "within noise" in printed
    (tmp_path / "link").symlink_to(out)
    monkeypatch.chdir(out)
    for place in (".", tmp_path / "link"):
        code, _, told = report("--target", model, "--prompts", *files, "--out", place, "--force")
        assert code == 0, told
    kept = {"link", "maths.jsonl", "out", "songs.jsonl"}
    assert kept <= {path.name for path in tmp_path.iterdir()}
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".work")]


def _refused(answer: tuple[int, str, str], told: str) -> None:
    code, _, err = answer
    assert code == 2 and told in err


def test_refusals_come_before_the_work(report: Report, model: Path, tmp_path: Path) -> None:
    few = prompts(tmp_path / "few.jsonl", 3)
    _refused(report("--target", model, "--prompts", few, "--out", tmp_path / "a"), "40 prompts are needed")
    _refused(report("--out", tmp_path / "a"), "needs --prompts and --out")
    enough = prompts(tmp_path / "enough.jsonl", 70)
    words = ("--target", model, "--prompts", enough, "--out", tmp_path / "a")
    _refused(report(*words, "--taps", "1,99"), "no such layer")
    _refused(report(*words, "--temperature", "0"), "greedy")
    _refused(report(*words, "--head", "auto"), "no head ships")
    for device in ("cuda:77", "abacus"):
        _refused(report(*words, "--device", device), "device: cannot be used here")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("package", ["matplotlib", "pyarrow"])
def test_what_writes_a_report_is_asked_for_before_the_work(
    package: str, report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # how Python marks what is not there
    enough = prompts(tmp_path / "a.jsonl", 70)
    answer = report("--target", "no-such-model", "--prompts", enough, "--out", tmp_path / "a")
    _refused(answer, f"needs {package}")


def test_a_place_that_cannot_be_written_is_refused_before_a_target_is_looked_for(
    report: Report, tmp_path: Path
) -> None:
    enough, file = prompts(tmp_path / "enough.jsonl", 70), tmp_path / "file"
    file.touch()
    for words in (("--out", file / "a"), ("--out", tmp_path / "new" / "a", "--work", file)):
        answer = report("--target", "no-such-model", "--prompts", enough, *words)
        _refused(answer, "is no directory to write into")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["enough.jsonl", "file"]


def test_rows_that_cannot_be_asked_are_named_and_left_out(model: Path) -> None:
    loaded = load_target(str(model))
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    loaded.tokenizer.chat_template = refusal + loaded.tokenizer.chat_template
    rows = [
        Dialogue("half", (), ("a \ud83d smile",)),
        Dialogue("told", ({"role": "system", "content": "x"},), ("y",)),
        Dialogue("good", (), ("y",)),
        Dialogue("\ud83d", (), ("y",)),
        Dialogue("more", (), ("\udc00",)),
    ]
    console = Console(record=True, width=200)
    made = passages_of(console, loaded, [("songs", row) for row in rows], 8)
    assert [passage.id for passage in made] == ["good"]
    told = console.export_text()
    for words in ("row half: is not UTF-8", "row told: do not fit the chat template: no system",
                  "1 more rows"):  # fmt: skip
        assert words in told


def test_a_head_of_another_target_is_refused(
    report: Report, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = engines.load(tmp_path, "qwen3", "lean")
    stranger = engines.random_head(other, range(3, 100))
    monkeypatch.setattr("specdec.head.checkpoint.load_head", lambda *_, **__: stranger)
    enough = prompts(tmp_path / "enough.jsonl", 70)
    words = ("--target", model, "--prompts", enough, "--head", tmp_path / "head", "--out", tmp_path / "a")
    _refused(report(*words), "trained on another target")


@pytest.mark.parametrize(("passed", "code"), [((True, True), 0), ((True, False), 1)])
def test_the_self_check_exits_1_when_a_control_fails(
    passed: Sequence[bool], code: int, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = [Check(f"control {i}", 0.0, 0.5, 0.1, each) for i, each in enumerate(passed)]
    monkeypatch.setattr(controls, "self_check", lambda: checks)
    found, told, _ = report("--self-check")
    assert found == code
    assert "0.5000" in told
    assert ("FAILED" in told) == bool(code)


def test_compare_refuses_what_is_no_report(report: Report, tmp_path: Path) -> None:
    _refused(report("--compare", tmp_path / "a.json", tmp_path / "b.json"), "cannot be read")


def test_rank_orders_trained_heads_by_a_plan(report: Report, tmp_path: Path) -> None:
    def number(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.01, "high": value + 0.01, "n": 9, "documents": 9}

    def written(name: str, **values: Any) -> Path:
        shared = {
            "version": VERSION,
            "cells": [],
            "target": {"name": "t", "fingerprint": "f"},
            "temperature": 1.0,
        }
        (tmp_path / name).write_text(json.dumps({**shared, **values}))
        return tmp_path / name

    gaps = [{"taps": str(i), "gap": number(0.1 + 0.1 * i)} for i in range(6)]
    plan_report = written("plan.json", taps=gaps, engine={})
    heads = [written(f"{i}.json", engine={"chain": {"tau": number(3 - 0.2 * i)}}, taps_used=str(i))
             for i in range(6)]  # fmt: skip
    code, told, _ = report("--rank", plan_report, *heads)
    assert code == 0 and "F3, chain: Kendall 1.0" in told
    _refused(report("--rank", plan_report), "needs reports of heads after the plan")
    _refused(report("--rank", *heads, plan_report), "plan.json")
    engine = {"chain": {"tau": number(2)}}
    for other in ({"target": {"name": "u", "fingerprint": "g"}}, {"temperature": 0.7}):
        stranger = written("stranger.json", engine=engine, taps_used="5", **other)
        _refused(report("--rank", plan_report, *heads[:5], stranger),
                 "layers 5 is not of the plan's target and temperature")  # fmt: skip
