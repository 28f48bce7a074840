"""The one script for a lent GPU: every stage runs in tiny on the CPU, none takes others down, bars are judged right."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import engines
import pytest
import tiny
import torch
from rich.console import Console

from bench import bars, gpu
from bench.record import FOLDER_VARIABLE
from bench.stages import STAGES, Setting
from specdec.errors import SpecdecError
from specdec.head.export import TargetNames, save_raw
from specdec.target.load import load_target


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("models")
    model = tiny.save("llama", folder)
    target = load_target(str(model), dtype=torch.float32).target
    head = save_raw(engines.random_head(target, range(20, 60)), folder / "head", target=TargetNames("tiny"),
                    dtype=torch.float32)  # fmt: skip
    return Setting("cpu", str(model), str(head), smoke=True)


ROWS = {
    "ceilings": ("gpu", "bytes"), "compile": ("gpu", "failed"), "choice": ("gpu", "picked"),
    "steps": ("steps", "plain_ms"), "speed": ("speed", "over_transformers"), "round": ("gpu", "ms_per_round"),
    "greedy": ("gpu", "divergences"), "kernels": ("kernels", "us"), "sweep": ("sweep", "over_plain"),
    "replay": ("sweep", "profile"), "products": ("kernels", "inputs"), "profile": ("gpu", "per_layer"),
    "touch": ("gpu", "relative_error"),
}  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_leaves_its_rows(
    stage: str, setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    STAGES[stage](setting)
    rows = gpu.read(tmp_path)
    name, key = ROWS[stage]
    assert any(key in row for row in rows[name])
    assert len(bars.judge(rows)) == 11


def _run(tmp_path: Path, **changes: Any) -> gpu.Run:
    fields = {
        "out": tmp_path,
        "target": "t",
        "head": "h",
        "also": (),
        "smoke": True,
        "deadline": time.monotonic() + 60,
    }
    return gpu.Run(**fields | changes)


def test_a_stage_that_fails_or_hangs_stays_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = {"ceilings": "print(7)", "steps": "raise SystemExit(3)", "speed": "import time; time.sleep(60)"}

    def command(_: gpu.Run, stage: str) -> list[str] | None:
        return [sys.executable, "-c", code[stage]] if stage in code else None

    monkeypatch.setattr(gpu, "command", command)
    plan = [("steps", 60), ("speed", 1), ("memcheck", 20), ("ceilings", 60)]
    gpu.perform_all(_run(tmp_path, smoke=False), plan, Console(quiet=True))
    gpu.perform_all(_run(tmp_path, deadline=time.monotonic() - 1), [("round", 20)], Console(quiet=True))
    told = {row["stage"]: row["status"] for row in gpu.read(tmp_path)["gpu"]}
    assert told == {"steps": "exit code 3", "speed": "cut off after 1 s", "memcheck": "absent", "ceilings": "done",
                    "round": "no time left"}  # fmt: skip
    assert "7" in (tmp_path / "log.txt").read_text()


def test_a_late_stage_in_this_process_cannot_be_held_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines catch whatever a driver refuses and go on: the end of a stage must not be among that."""

    def stubborn(_: Setting) -> None:
        until = time.monotonic() + 30
        while time.monotonic() < until:
            with contextlib.suppress(Exception):
                time.sleep(30)

    monkeypatch.setitem(STAGES, "steps", stubborn)
    began = time.monotonic()
    assert gpu.perform(_run(tmp_path, together=True), "steps", 1.0) == "cut off after 1 s"
    assert time.monotonic() - began < 10


def test_stages_run_as_commands(tmp_path: Path) -> None:
    """One real stage from the command line, and the verdicts of a run that measured next to nothing."""
    run = [
        "--smoke",
        "--out",
        str(tmp_path),
        "--stages",
        "ceilings",
        "--target",
        str(tiny.save("llama", tmp_path)),
    ]
    assert gpu.main(run) == 0
    assert [row["kind"] for row in gpu.read(tmp_path)["gpu"]] == ["ceiling", "stage"]
    verdicts = json.loads((tmp_path / "verdicts.json").read_text())
    assert {verdict for _, verdict, _ in verdicts} == {"unmeasured"}


def test_random_weights_serve_what_needs_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_OVERLAP", "2")
    run = ["--smoke", "--out", str(tmp_path), "--stages", "ceilings", "speed", "--target", "random-135m"]
    assert gpu.main(run) == 0
    rows = gpu.read(tmp_path)["gpu"]
    assert {row["stage"]: row["status"] for row in rows if row["kind"] == "stage"} == {"ceilings": "done",
                                                                                      "speed": "absent"}  # fmt: skip
    assert all(row["switches"]["SPECDEC_OVERLAP"] == "2" for row in rows)


def test_without_cuda_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "--smoke" in " ".join(capsys.readouterr().err.split())


def test_pieces_of_a_model_are_joined_in_order(tmp_path: Path) -> None:
    for name, text in (("m.gguf.ab", "right"), ("m.gguf.aa", "left ")):
        (tmp_path / name).write_text(text)
    folder = tmp_path / "whole"
    folder.mkdir()
    whole = gpu._model([str(path) for path in tmp_path.glob("m.gguf.*")], folder)
    with pytest.raises(SpecdecError, match="no such file"):
        gpu._model([str(tmp_path / "absent")], folder)
    assert (Path(whole).name, Path(whole).read_text()) == ("m.gguf", "left right")


def test_every_planned_stage_has_a_command(tmp_path: Path) -> None:
    for stage, _ in gpu.PLAN:
        words = gpu.command(_run(tmp_path, also=("a", "b")), stage)
        assert stage == "memcheck" or (words is not None and words[0] == sys.executable)


STEP = {"target": "random-8b", "batch": 1}
GOOD: dict[str, list[dict[str, Any]]] = {
    "steps": [{**STEP, "nodes": 1, "captured_ms": 4.0}, {**STEP, "nodes": 64, "captured_ms": 4.2},
              {**STEP, "nodes": 60, "captured_token_ms": 4.0, "token_floor_ms": 3.5, "captured_round_ms": 6.0,
               "captured_verify_ms": 4.5, "captured_draft_ms": 1.2, "floor_ms": 5.0}],
    "speed": [
        {"system": "plain", "temperature": 0, "decode_tokens_per_second": 1600.0},
        {"system": "head", "temperature": 0, "over_plain": 2.1, "over_transformers": 9.0},
    ],
    "sweep": [{"over_plain": 0.98}],
    "kernels": [
        {"kind": "attention", "model": "8b", "length": 1024, "batch": 1, "nodes": 64, "backend": name, "us": us,
         "wrong": False} for name, us in (("triton", 5.0), ("sdpa", 9.0))
    ],
    "gpu": [
        {"kind": "greedy", "dtype": "torch.float32", "prompts": 3, "divergences": []},
        {"kind": "greedy", "dtype": "torch.bfloat16", "prompts": 3, "divergences": [{"gap": 0.125}]},
        {"kind": "stage", "stage": "memcheck", "status": "done"},
    ],
}  # fmt: skip
BAD = {
    0: ("steps", 2, {"token_floor_ms": 3.0}), 1: ("speed", 0, {"decode_tokens_per_second": 1400.0}),
    2: ("steps", 1, {"captured_ms": 4.6}), 3: ("steps", 2, {"captured_round_ms": 7.0}),
    4: ("speed", 1, {"over_plain": 1.9}),
    5: ("speed", 1, {"over_transformers": 7.9}), 6: ("kernels", 1, {"us": 4.9}), 7: ("sweep", 0, {"over_plain": 0.96}),
    8: ("gpu", 0, {"divergences": [{"gap": 0.0}]}), 9: ("gpu", 1, {"divergences": [{"gap": 0.625}]}),
    10: ("gpu", 2, {"status": "exit code 9"}),
}  # fmt: skip


def test_good_rows_pass_every_bar_and_none_leave_all_open() -> None:
    assert [bar.verdict for bar in bars.judge(GOOD)] == ["PASS"] * 11
    assert [bar.verdict for bar in bars.judge({})] == ["unmeasured"] * 11
    assert bars.table(bars.judge(GOOD)).row_count == 11


def test_the_smallest_share_of_the_floor_decides() -> None:
    slow, fast = ({**GOOD["steps"][2], "token_floor_ms": floor} for floor in (2.0, 3.9))
    bar = bars.judge({"steps": [slow, fast]})[0]
    assert (bar.verdict, bar.found) == ("FAIL", "0.5 (worst of 2)")


@pytest.mark.parametrize("number", BAD)
def test_one_figure_fails_its_bar_alone(number: int) -> None:
    name, index, change = BAD[number]
    rows = {file: [dict(row) for row in given] for file, given in GOOD.items()}
    rows[name][index] |= change
    failed = [i for i, bar in enumerate(bars.judge(rows)) if bar.verdict == "FAIL"]
    assert failed == [number]
