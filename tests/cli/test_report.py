import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import engines
import pytest
import tiny
from rich.console import Console
from tiny_report import TINY_PLAN

from specdec.cli import main
from specdec.cli.passages import passages_of
from specdec.cli.prompts import Dialogue
from specdec.surplus import controls, plan
from specdec.surplus.controls import Check
from specdec.surplus.write import VERSION
from specdec.target.load import load_target


def prompts(path: Path, count: int) -> str:
    rows = [{"id": f"q{i}", "prompt": f"tell me {i} {path.stem}"} for i in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def specdec(*words: str | Path) -> int:
    return main.main(["report", *map(str, words)])


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("target"))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--budget quick` is the tests' own plan."""
    monkeypatch.setitem(plan.BUDGETS, "quick", TINY_PLAN)


def test_a_plan_report_from_the_command_line(
    small: None,
    target: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = [prompts(tmp_path / f"{name}.jsonl", 25) for name in ("songs", "maths")]
    out = tmp_path / "out"
    words = (
        "--target",
        target,
        "--prompts",
        *files,
        "--out",
        out,
        "--taps",
        "1,4,6",
        "--taps",
        "8",
        "--json",
    )
    assert specdec(*words) == 0
    told = capsys.readouterr()
    values = json.loads(told.out)
    assert values["kind"] == "plan"
    assert values["domain_names"] == ["songs", "maths"]
    assert str(tmp_path) not in values["told"]["command"].replace(str(target), "")
    for options in ("--taps 1,4,6 --taps 8", "--dtype float32 --device cpu"):
        assert options in values["told"]["command"]
    assert "tap sets" in told.err
    assert "claims" in told.err
    assert (out / "report.html").is_file()
    assert not (tmp_path / "out.work").exists()
    assert specdec(*words) == 2  # the report exists
    assert "exists already" in capsys.readouterr().err
    assert specdec("--compare", out, out / "report.json") == 0
    assert "within noise" in capsys.readouterr().out
    (tmp_path / "link").symlink_to(out)
    monkeypatch.chdir(out)
    for place in (".", tmp_path / "link"):
        assert specdec("--target", target, "--prompts", *files, "--out", place, "--force") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "maths.jsonl", "out", "songs.jsonl"]


def test_refusals_come_before_the_work(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = prompts(tmp_path / "few.jsonl", 3)
    assert specdec("--target", target, "--prompts", few, "--out", tmp_path / "a") == 2
    assert "40 prompts are needed" in capsys.readouterr().err
    assert specdec("--out", tmp_path / "a") == 2
    assert "needs --prompts and --out" in capsys.readouterr().err
    enough = prompts(tmp_path / "enough.jsonl", 70)
    words = ("--target", target, "--prompts", enough, "--out", tmp_path / "a")
    assert specdec(*words, "--taps", "1,99") == 2
    assert "no such layer" in capsys.readouterr().err
    assert specdec(*words, "--temperature", "0") == 2
    assert "greedy" in capsys.readouterr().err
    assert specdec(*words, "--head", "auto") == 2
    assert "no head ships" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("package", ["matplotlib", "pyarrow"])
def test_what_writes_a_report_is_asked_for_before_the_work(
    package: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # how Python marks what is not there
    words = (
        "--target",
        "no-such-model",
        "--prompts",
        prompts(tmp_path / "a.jsonl", 70),
        "--out",
        tmp_path / "a",
    )
    assert specdec(*words) == 2
    assert f"needs {package}" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_refused_before_a_target_is_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    enough, file = prompts(tmp_path / "enough.jsonl", 70), tmp_path / "file"
    file.touch()
    for words in (("--out", file / "a"), ("--out", tmp_path / "new" / "a", "--work", file)):
        assert specdec("--target", "no-such-model", "--prompts", enough, *words) == 2
        assert "is no directory to write into" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["enough.jsonl", "file"]


def test_rows_that_cannot_be_asked_are_named_and_left_out(target: Path) -> None:
    loaded = load_target(str(target))
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
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = engines.load(tmp_path, "qwen3", "lean")
    stranger = engines.random_head(other, range(3, 100))
    monkeypatch.setattr("specdec.head.checkpoint.load_head", lambda *_, **__: stranger)
    enough = prompts(tmp_path / "enough.jsonl", 70)
    words = ("--target", target, "--prompts", enough, "--head", tmp_path / "head", "--out", tmp_path / "a")
    assert specdec(*words) == 2
    assert "trained on another target" in capsys.readouterr().err


@pytest.mark.parametrize(("passed", "code"), [((True, True), 0), ((True, False), 1)])
def test_the_self_check_exits_1_when_a_control_fails(
    passed: Sequence[bool], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = [Check(f"control {i}", 0.0, 0.5, 0.1, each) for i, each in enumerate(passed)]
    monkeypatch.setattr(controls, "self_check", lambda: checks)
    assert specdec("--self-check") == code
    told = capsys.readouterr().out
    assert "0.5000" in told
    assert ("FAILED" in told) == bool(code)


def test_compare_refuses_what_is_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert specdec("--compare", tmp_path / "a.json", tmp_path / "b.json") == 2
    assert "cannot be read" in capsys.readouterr().err


def test_rank_orders_trained_heads_by_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def number(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.01, "high": value + 0.01, "n": 9, "documents": 9}

    def report(name: str, **values: Any) -> Path:
        shared = {
            "version": VERSION,
            "cells": [],
            "target": {"name": "t", "fingerprint": "f"},
            "temperature": 1.0,
        }
        (tmp_path / name).write_text(json.dumps({**shared, **values}))
        return tmp_path / name

    gaps = [{"taps": str(i), "gap": number(0.1 + 0.1 * i)} for i in range(6)]
    plan_report = report("plan.json", taps=gaps, engine={})
    heads = [report(f"{i}.json", engine={"chain": {"tau": number(3 - 0.2 * i)}}, taps_used=str(i))
             for i in range(6)]  # fmt: skip
    assert specdec("--rank", plan_report, *heads) == 0
    assert "F3, chain: Kendall 1.0" in capsys.readouterr().out
    assert specdec("--rank", plan_report) == 2
    assert "needs reports of heads after the plan" in capsys.readouterr().err
    assert specdec("--rank", *heads, plan_report) == 2
    assert "plan.json" in capsys.readouterr().err
    engine = {"chain": {"tau": number(2)}}
    for other in ({"target": {"name": "u", "fingerprint": "g"}}, {"temperature": 0.7}):
        stranger = report("stranger.json", engine=engine, taps_used="5", **other)
        assert specdec("--rank", plan_report, *heads[:5], stranger) == 2
        assert "layers 5 is not of the plan's target and temperature" in capsys.readouterr().err


def test_the_options_are_these() -> None:
    words = {word for action in main.parser("report")._subparsers._group_actions[0].choices["report"]._actions  # type: ignore[union-attr,index]  # argparse hides its tables
             for word in action.option_strings}  # fmt: skip
    assert words == {
        "-h", "--help", "--target", "--head", "--prompts", "--out", "--budget", "--temperature", "--seed", "--taps",
        "--dtype", "--device", "--force", "--work", "--json", "--compare", "--self-check", "--rank",
    }  # fmt: skip
