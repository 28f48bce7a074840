"""Whether the copy engine's products may be tried in this process: a process of its own runs them first, once.

A kernel that faults ends everything its process does on the device, and one that waits forever ends nothing. Where the
threads of a program fetch, neither can happen to a right index; what the copy engine does depends on device, driver and
compiler too. So that is found out where nothing is lost.
"""

from __future__ import annotations

import functools
import hashlib
import json
import signal
import subprocess
import sys
import warnings
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch

from specdec.fused.cuts import Kind, candidates
from specdec.places import cache_root, replacing

SECONDS = 240.0  # to start, compile and run; whoever takes longer hangs
PROGRAM = ("-m", "specdec.fused.proof")
FAULT, NO_END = 70, 71
# inputs, outputs, norm, paired, plus, rows: of each way to fetch, small matrices and large
SAMPLES = (
    (1536, 576, False, False, True, 16), (4096, 4096, False, False, True, 64), (4096, 6144, True, False, False, 16),
    (4096, 14336, True, True, False, 64),
)  # fmt: skip


@functools.cache
def copies_proven(device: torch.device) -> bool:
    """Did the copy engine's products run to their end on such a device? What was found is remembered on disk."""
    path = _record(device)
    with suppress(OSError, ValueError, KeyError, TypeError):
        return bool(json.loads(path.read_text(encoding="utf-8"))["works"])
    code, told = _tried_by_another(device)
    if code != 0:
        warnings.warn(f"products by the copy engine are left out: {told}", stacklevel=2)
    if code in (0, FAULT, NO_END) or (
        code < 0 and code != -signal.SIGKILL
    ):  # else it may end otherwise another time
        with suppress(OSError), replacing(path) as fresh:
            fresh.write_text(json.dumps({"works": code == 0, "told": told}), encoding="utf-8")
    return code == 0


def _tried_by_another(device: torch.device) -> tuple[int, str]:
    """How the process that tries them ended (below zero by a signal), and its last words."""
    command = [
        sys.executable,
        *PROGRAM,
        str(torch.cuda.current_device() if device.index is None else device.index),
    ]
    try:
        run = subprocess.run(command, timeout=SECONDS, capture_output=True, text=True, check=False)
    except subprocess.TimeoutExpired:
        return NO_END, f"trying them did not end in {SECONDS:.0f} seconds"
    except OSError as error:
        return 1, f"no process to try them in: {error}"
    words = run.stderr.strip().splitlines() or [f"ended with {run.returncode}"]
    return run.returncode, words[-1]


def _record(device: torch.device) -> Path:
    """Another device, driver, compiler or kernel asks anew."""
    sources = (Path(__file__).with_name(name).read_bytes() for name in ("product_kernels.py", "cuts.py"))
    key = repr((torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device), torch.version.cuda,
                version("triton"), *(hashlib.sha256(text).hexdigest() for text in sources)))  # fmt: skip
    return cache_root() / "fused" / f"copies-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def samples(device: torch.device) -> list[Kind]:
    """Products whose cuts are tried here."""
    return [Kind(inputs, outputs, torch.bfloat16, device, *rest) for inputs, outputs, *rest in SAMPLES]  # type: ignore[arg-type]


@torch.inference_mode()
def main(index: int) -> int:
    """Run every cut of the samples that the copy engine fetches for; whether it is right is for a trial to say."""
    from specdec.fused.trial import Trial  # which asks this file

    torch.cuda.set_device(index)
    for kind in samples(torch.device("cuda", index)):
        weight = torch.zeros(kind.lines, kind.inputs, dtype=kind.dtype, device=kind.device)
        trial = Trial.of(kind, weight)
        for cut in candidates(kind):
            if not cut.tma:
                continue
            with suppress(Exception):  # one that does not compile or launch is left out by its own trial
                trial.ours(0, cut)
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                sys.stderr.write(f"{kind}, {cut}: {error}".partition("\n")[0])
                return FAULT
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
