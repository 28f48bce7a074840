"""The log of a run holds every step once, wherever the run was killed."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from training.watch import LOG, Watch, read_log


def row(step: int, kind: str = "step") -> dict[str, object]:
    return {"kind": kind, "step": step, "done": 0.1, "loss": [1.0], "overlap": [0.5]}


def test_a_run_that_goes_on_from_a_checkpoint_tells_its_steps_once(tmp_path: Path) -> None:
    with Watch(tmp_path, Console(quiet=True)) as watch:
        for step in (1, 2, 3, 4):
            watch(row(step))
        watch(row(4, "evaluation"))
    with (tmp_path / LOG).open("a") as file:
        file.write(json.dumps(row(5))[:20])  # killed here, the last checkpoint being of step 2
    with Watch(tmp_path, Console(quiet=True)) as watch:
        watch.rewind(2)
        watch(row(3))
    assert [one["step"] for one in read_log(tmp_path / LOG, "step")] == [1, 2, 3]
    assert read_log(tmp_path / LOG, "evaluation") == []
