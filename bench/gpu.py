"""`python -m bench.gpu --out DIR`: everything a lent GPU must tell, in one go of less than ten minutes.

Each stage (see bench/stages.py) runs in a process of its own, with a limit; rows are appended to DIR as they come, and
at the end the bars are judged. `--smoke` runs every stage in tiny on the CPU.

Where no package index is reached, carry what the machine lacks: the wheel of `gguf` on PYTHONPATH (a pure wheel is
imported as it is), and a model's GGUF, whole or in pieces:

    split -b 45M SmolLM2-135M-Instruct.Q4_1.gguf carry/smollm2.gguf.       # two calls carry one piece each
    PYTHONPATH=carry/gguf.whl python3 -m bench.gpu --out "$OUT" --gguf carry/smollm2.gguf.*

Kernels may be carried, too, instead of being compiled there for minutes: see `bench.abroad`. While the pieces are not
all there, `--target random-135m` measures what needs no weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import bars, stages
from bench.record import FOLDER_VARIABLE, append
from bench.steps import SHAPES
from specdec.errors import SpecdecError, UnsupportedError
from specdec.target.embedded import NAME, SHA256
from specdec.target.files import resolve
from specdec.target.store import sha256_of

PLAN = (
    ("ceilings", 40), ("compile", 150), ("choice", 60), ("steps", 110), ("greedy", 45), ("speed", 80), ("sweep", 130),
    ("kernels", 150), ("memcheck", 60), ("replay", 90), ("round", 60), ("profile", 60), ("products", 90), ("tests", 60),
)  # fmt: skip
"""Stages in the order of what matters most, with the seconds each may take."""

REAL = ("greedy", "speed", "sweep")  # stages that want a model's own weights
SLOW = 10  # how much longer a stage may take in tiny on a busy CPU
AGAIN = 5.0  # seconds between the alarms of a stage that is late
SANITIZER = "compute-sanitizer"
FILES = ("kernels", "steps", "speed", "sweep", "gpu")


@dataclass(frozen=True, slots=True)
class Run:
    """One go.

    Attributes:
        out: where rows and the log go.
        target, head, also: see `stages.Setting`.
        smoke: tiny, on the CPU.
        deadline: of the monotonic clock; no stage starts after it.
        together: stages run in this process: no imports again and again, but a fault of one ends all.
    """

    out: Path
    target: str
    head: str
    also: tuple[str, ...]
    smoke: bool
    deadline: float
    together: bool = False


def command(run: Run, stage: str) -> list[str] | None:
    """The command line of a stage; None where what it needs is not there."""
    inner = "touch" if stage == "memcheck" else stage
    words = [sys.executable, "-m", "bench.stages", inner, "--device", "cpu" if run.smoke else "cuda",
             "--target", run.target, "--head", run.head]  # fmt: skip
    words += ["--also", *run.also] if run.also else []
    words += ["--smoke"] if run.smoke else []
    if stage == "tests":
        return [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:benchmark",
            "tests/attention",
            "tests/engine/test_pipeline.py",
            "tests/fused",
        ]
    if stage != "memcheck":
        return words
    found = shutil.which(SANITIZER) or shutil.which(SANITIZER, path="/usr/local/cuda/bin")
    return None if found is None else [found, "--tool", "memcheck", "--error-exitcode", "9", *words]


def perform(run: Run, stage: str, seconds: float) -> str:
    """Run one stage; returns "done", "absent" or what went wrong."""
    words = command(run, stage)
    if words is None or (stage in REAL and run.target in SHAPES):
        return "absent"
    if run.together and stage in stages.STAGES:
        return _here(run, stage, seconds)
    with (run.out / "log.txt").open("a", encoding="utf-8") as log:
        log.write(f"\n==== {stage}\n")
        log.flush()
        try:
            process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment(run),
                                       start_new_session=True)  # fmt: skip
        except OSError as error:
            return f"could not start: {error}"
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            # with what it has started: later stages want the device alone
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"cut off after {seconds:.0f} s"
    return "done" if code == 0 else f"exit code {code}"


class Late(BaseException):
    """A stage's time is over. No `Exception`: those an engine catches, and goes on in a slower way."""


def _here(run: Run, stage: str, seconds: float) -> str:
    """A stage in this process, ended by an alarm."""
    setting = stages.Setting("cpu" if run.smoke else "cuda", run.target, run.head, run.also, run.smoke)

    def late(*_: object) -> None:
        raise Late(f"cut off after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    # again and again: a clean-up or a callback may swallow one
    signal.setitimer(signal.ITIMER_REAL, max(1.0, seconds), AGAIN)
    try:
        os.environ[FOLDER_VARIABLE] = str(run.out)
        stages.STAGES[stage](setting)
    except (Exception, Late) as error:  # the others still run
        signal.setitimer(signal.ITIMER_REAL, 0)
        with (run.out / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"\n==== {stage}\n{traceback.format_exc()}")
        return str(error) if isinstance(error, Late) else f"{type(error).__name__}: {error}"[:200]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return "done"


def environment(run: Run) -> dict[str, str]:
    """Results go to the run's folder; the memory checker must see every allocation by itself."""
    return {**os.environ, FOLDER_VARIABLE: str(run.out), "PYTHONUNBUFFERED": "1"}


def perform_all(run: Run, plan: Sequence[tuple[str, int]], console: Console) -> None:
    """Every stage for which there is time."""
    for stage, limit in plan:
        left = run.deadline - time.monotonic()
        start = time.monotonic()
        status = (
            perform(run, stage, min(limit, left) * (SLOW if run.smoke else 1)) if left > 0 else "no time left"
        )
        seconds = round(time.monotonic() - start, 1)
        row = {"kind": "stage", "stage": stage, "status": status, "seconds": seconds}
        append("gpu", [row], results=run.out)
        console.print(f"{stage}: {status} ({seconds} s)", highlight=False)


def read(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows by file."""
    found = {name: out / f"{name}.jsonl" for name in FILES}
    return {name: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            for name, path in found.items() if path.is_file()}  # fmt: skip


def joined(pieces: Sequence[Path], folder: Path) -> str:
    """A target's name for a GGUF file in pieces, in the order of their names; the embedded default keeps its own."""
    whole = folder / f"{pieces[0].name.split('.gguf')[0]}.gguf"
    with whole.open("wb") as file:
        for piece in sorted(pieces):
            with piece.open("rb") as part:
                shutil.copyfileobj(part, file)
    if sha256_of(whole) != SHA256:
        return str(whole)
    # converted under its name, which then needs no package
    resolve(str(whole.rename(folder / f"{NAME}.gguf")))
    return NAME


def _model(names: Sequence[str], folder: Path) -> str:
    pieces = [Path(name) for name in names]
    for piece in pieces:
        if not piece.is_file():
            raise SpecdecError("no such file", field="gguf", value=str(piece))
    return joined(pieces, folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, judge, tell. Exit code 2 and one sentence where it cannot start; 0 whatever the verdicts."""
    args = _arguments(argv)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = _prepare(args, Path(folder))
        except SpecdecError as error:
            console.print(str(error), markup=False)
            return 2
        plan = [(name, limit) for name, limit in PLAN if not args.stages or name in args.stages]
        perform_all(run, plan, console)
    verdicts = bars.judge(read(run.out))
    (run.out / "verdicts.json").write_text(
        json.dumps([[b.name, b.verdict, b.found] for b in verdicts], indent=1)
    )
    Console(width=140).print(bars.table(verdicts))
    return 0


def _prepare(args: argparse.Namespace, folder: Path) -> Run:
    if not args.smoke and not torch.cuda.is_available():
        raise UnsupportedError("this run measures a CUDA device", field="device", value="cpu", allowed="cuda",
                               remedy="Run it on a machine with an NVIDIA GPU, or try it with --smoke.")  # fmt: skip
    deadline = time.monotonic() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    target = _model(args.gguf, folder) if args.gguf else args.target
    if target not in SHAPES:
        resolve(target)  # converts once, before anything is timed
    also = [_model(given.split(","), folder) for given in args.also]
    return Run(args.out.resolve(), target, args.head, tuple(also), args.smoke, deadline, args.together)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT") or "gpu-results"), help="directory of the rows"
    )
    parser.add_argument("--target", default=NAME, help="a model (default: the embedded one)")
    parser.add_argument("--head", default="head", help="its head: the shipped one, a directory, or ngram")
    parser.add_argument(
        "--gguf", nargs="+", default=[], metavar="FILE", help="the model as a GGUF, whole or in pieces"
    )
    parser.add_argument(
        "--also", nargs="+", default=[], metavar="FILE[,FILE]", help="further GGUFs for their steps"
    )
    parser.add_argument(
        "--stages", nargs="+", choices=[name for name, _ in PLAN], default=[], help="these alone"
    )
    parser.add_argument("--minutes", type=float, default=9.3, help="for all stages (default: 9.3)")
    parser.add_argument(
        "--together", action="store_true", help="all stages in one process, which saves their imports"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU: does every stage run?")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
