"""What a person sees of a run and what a file remembers: progress bar, train_log.jsonl, trackers.

Knows rows of numbers; nothing of training.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from specdec.places import replacing

LOG = "train_log.jsonl"
Row = dict[str, Any]


class Watch:
    """Hears of rows: prints, logs, tracks. A context manager.

    Args:
        directory: of train_log.jsonl; lines are appended, one per row.
        console: where the bar goes.
        accelerator: whose trackers hear of numbers, None for none.
    """

    def __init__(self, directory: Path, console: Console, accelerator: Accelerator | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path, self.console, self.accelerator = directory / LOG, console, accelerator
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
                   TextColumn("{task.fields[numbers]}"), TimeElapsedColumn())  # fmt: skip
        self._bar = Progress(*columns, console=console)
        self._task = self._bar.add_task("training", total=1.0, numbers="")
        self._tau = ""

    def rewind(self, step: int) -> None:
        """Leave out of the log what came after `step`: a run that was killed goes on from its last checkpoint and tells
        these steps again. Half a line goes, too."""
        if not self.path.exists():
            return
        rows = [row for row in _rows(self.path) if row.get("step", 0) <= step]
        with replacing(self.path) as fresh:
            fresh.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:  # the clock may have ended the run in the middle of an epoch
            self._bar.update(self._task, completed=1.0)
        self._bar.stop()

    def __call__(self, row: Row) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if row["kind"] == "step":
            self._step(row)
        elif row["kind"] == "evaluation":
            self._tau = f"tau {row['tau']:.2f}" if "tau" in row else ""
            for name in ("greedy", "sampled"):
                if name in row:
                    self._bar.console.print(f"step {row['step']}: {describe(name, row[name])}")
        if self.accelerator is not None:
            self.accelerator.log(flat(row), step=row.get("step"))

    def _step(self, row: Row) -> None:
        overlaps = " ".join(f"{value:.2f}" for value in row["overlap"])
        numbers = f"loss {row['loss'][0]:.3f} alpha {overlaps} {self._tau}"
        self._bar.update(self._task, completed=row["done"], numbers=numbers)


def describe(name: str, row: Row) -> str:
    """One line of an evaluation."""
    alpha = " ".join(f"{value:.2f}" for value in row["alpha"])
    return f"{name}: tree tau {row['tau']:.2f} (alpha {alpha}), chain tau {row['tau_chain']:.2f}"


def flat(row: Row) -> dict[str, float]:
    """Numbers of a row by path, as trackers want them.

    >>> flat({"kind": "step", "loss": [1.0, 2.0], "greedy": {"tau": 3.0}})
    {'loss/0': 1.0, 'loss/1': 2.0, 'greedy/tau': 3.0}
    """
    out: dict[str, float] = {}

    def visit(path: str, value: object) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                visit(f"{path}/{name}" if path else str(name), inner)
        elif isinstance(value, list):
            for index, inner in enumerate(value):
                visit(f"{path}/{index}", inner)
        elif isinstance(value, int | float):
            out[path] = value

    visit("", row)
    return out


def read_log(path: Path, kind: str) -> list[Row]:
    """Rows of one kind; a torn last line is left out."""
    return [row for row in _rows(path) if row.get("kind") == kind] if path.exists() else []


def _rows(path: Path) -> Iterator[Row]:
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            yield json.loads(line)
