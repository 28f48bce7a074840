"""Lets go of the OpenMP threads that a thread of Python keeps, so that the next one to compute has the cores.

GNU's OpenMP keeps a team for every thread that ever ran parallel work. With more kept threads than cores, none of them
spins any longer between two pieces of work, and waking them costs more than the work: a token took 1.15 to 1.3 times as
long in a server's thread as in the one that had loaded the model.
"""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

MAPS = Path("/proc/self/maps")
SOFT = 1  # omp_pause_soft (OpenMP 5.0, 3.2.44): threads go, settings stay


def release_workers() -> int:
    """End the calling thread's team, which comes back when it is wanted. The number of OpenMP libraries that did.

    Only GNU's on Linux is known; elsewhere nothing happens.
    """
    return sum(_pause(path) for path in _libraries())


def _libraries() -> set[str]:
    """Paths of the GNU OpenMP libraries in this process: torch brings its own, under a name of its own."""
    if not MAPS.exists():
        return set()
    lines = MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
    return {line.split(maxsplit=5)[-1] for line in lines if "libgomp" in line}


def _pause(path: str) -> bool:
    with contextlib.suppress(OSError, AttributeError):  # gone meanwhile, or older than OpenMP 5
        return int(ctypes.CDLL(path).omp_pause_resource_all(SOFT)) == 0
    return False
