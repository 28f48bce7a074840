"""Real processes: a run that is killed outright goes on bit for bit, and two processes walk the path of one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

TESTS = Path(__file__).parent.parent
LAUNCHED = str(TESTS / "launched_training.py")
SCRIPT = str(TESTS / "training_process.py")
STEPS = 50
TWO = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
       "--mixed_precision", "no", "--dynamo_backend", "no")  # fmt: skip


def environment() -> dict[str, str]:
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


def rows_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def run(
    directory: Path, *overrides: str, launch: tuple[str, ...] = (), pause: float = 0.0
) -> list[dict[str, Any]]:
    directory.mkdir(exist_ok=True)
    command = [sys.executable, *launch, SCRIPT, str(directory), str(pause), *overrides]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return rows_of(done.stdout)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_sigkill_at_any_step_changes_no_bit(tmp_path: Path, optimizer: str) -> None:
    """Killed while it writes a checkpoint after every step; the place depends on the run's own clock."""
    options = (f"optimizer.name={optimizer}", "trainer.save_every_minutes=1e-9", "loss.prompt_weight=0.5")
    steps = run(tmp_path / "straight", *options)[-1]["step"]
    killed = tmp_path / "killed"
    killed.mkdir()
    command = [sys.executable, SCRIPT, str(killed), "0.02", *options]
    fatal = random.randint(2, steps - 2)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{") and json.loads(line)["step"] >= fatal:
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    later = run(killed, *options)
    assert 0 < len(later) < steps, f"killed at step {fatal}: it did not resume"
    straight, resumed = (torch.load(d / "weights.pt") for d in (tmp_path / "straight", killed))
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items()), (
        f"killed at step {fatal}"
    )


def test_two_processes_follow_one_with_twice_the_batch(tmp_path: Path) -> None:
    """DDP under `accelerate launch` against accumulation of the same micro-batches, loss by loss over 50 steps."""
    options = ("trainer.epochs=26", "loss.prompt_weight=0.5")
    one = run(tmp_path / "one", *options, "trainer.accumulation=2")
    two = run(tmp_path / "two", *options, launch=TWO)
    assert len(one) == len(two) >= STEPS
    for left, right in zip(one[:STEPS], two[:STEPS], strict=True):
        assert left["loss"] == pytest.approx(right["loss"], abs=1e-4), left["step"]
    assert one[STEPS - 1]["loss"][0] < 0.8 * one[0]["loss"][0], "nothing was learnt, so nothing was compared"


@pytest.mark.slow
def test_two_processes_train_on_the_same_answers_when_time_is_short(tmp_path: Path) -> None:
    """Each used to write more answers in turn, as far as the clock let it, and so to walk through other windows. One of
    them tells of it; and what the launcher says of precision is not the recipe's word."""
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "head"
    prompts.write_text(
        "".join(json.dumps({"id": f"row-{n}", "prompt": f"Say {n}"}) + "\n" for n in range(3000))
    )
    settings = ("data.max_length=64", "responses.max_tokens=24", "responses.batch=4", "responses.max_minutes=0.01",
                "vocab.size=40", "head.taps=[2,4,6]", "unroll.steps=1", "unroll.curriculum=[]", "trainer.epochs=1",
                "evaluation.prompts=2", "trainer.batch_tokens=256", "trainer.precision=fp32",
                "trainer.max_minutes=null", "trainer.tracker=none")  # fmt: skip
    target = tiny.save("llama", tmp_path)
    launch = [word if word != "no" else "bf16" for word in TWO[:-2]]
    command = [sys.executable, *launch, LAUNCHED, "--target", str(target), "--prompts",
               str(prompts), "--out", str(out), *settings]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = [line for line in done.stdout.splitlines() if line.startswith("texts")]
    assert len(told) == 2 and told[0] == told[1]
    assert done.stderr.count("data:") == 1
    assert "row-2999" not in (out / "run" / "responses.jsonl").read_text(), "time was not short"
