"""`python -m bench.warm`: compile what the GPU's stages launch, by all cores at once, into Triton's cache.

A process compiles one kernel after another, a second each and some hundreds in all; on a machine that has compiled
nothing this would be most of a short lease. Nothing is timed here: the processes disturb each other.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from bench.record import FOLDER_VARIABLE

SECONDS = 120.0  # all of it may take
Command = tuple[str, ...]


def commands() -> list[Command]:
    """Benches that between them launch every product, and whole rounds."""
    parts = (("qkv",), ("out",), ("down",), ("gate_up", "head"))
    large = [_products("8b", rows, *part) for rows, part in itertools.product(("64", "16", "32", "1"), parts)]
    small = [
        _products("135m", rows, "qkv", "out", "gate_up", "down", "head") for rows in ("64", "16", "32", "1")
    ]
    rounds = [("bench.steps", "--targets", target, "--batches", "1", "--nodes", "1", "16", "--no-ceiling")
              for target in ("random-8b", "random-135m")]  # fmt: skip
    return [*rounds, *large, *small]


def _products(model: str, rows: str, *names: str) -> Command:
    return (
        "bench.products",
        "--models",
        model,
        "--rows",
        rows,
        "--products",
        *names,
        "--try-blocks",
        "--compile-only",
    )


def run(jobs: Sequence[Command], seconds: float = SECONDS) -> dict[Command, str]:
    """Run modules, one process a core; how each ended: "done", its exit code, or that it was cut off."""
    waiting, running, ended = list(jobs), dict[Command, subprocess.Popen[bytes]](), dict[Command, str]()
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, FOLDER_VARIABLE: folder}
        last = time.monotonic() + seconds
        try:
            while waiting or running:
                while waiting and len(running) < (os.cpu_count() or 1):
                    job = waiting.pop(0)
                    running[job] = subprocess.Popen([sys.executable, "-m", *job], env=environment,
                                                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
                for job in [job for job, process in running.items() if process.poll() is not None]:
                    code = running.pop(job).returncode
                    ended[job] = "done" if code == 0 else f"exit code {code}"
                if time.monotonic() > last:
                    break
                time.sleep(0.05)
        finally:
            for process in running.values():
                process.kill()
                process.wait()
    return ended | dict.fromkeys([*running, *waiting], "cut off")


def main() -> int:
    """Compile all; exit code 1 where something did not."""
    told = run(commands())
    for job, how in told.items():
        sys.stderr.write(f"{how}: {' '.join(job)}\n")
    return int(any(how != "done" for how in told.values()))


if __name__ == "__main__":
    sys.exit(main())
