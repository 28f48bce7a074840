"""The C kernels of this package as a loaded library: compiled once for this processor, remembered in the cache.

Plain C through the system's compiler, as triton and inductor do for their devices; some seconds. Where there is no
compiler, or it fails, the library is None, torch's own operations do the work, and `why_not` tells the reason.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from specdec.places import cache_root, replacing

SWITCH = "SPECDEC_NATIVE"  # "0" leaves the kernels out
SOURCES = (
    "linear.c",
    "tiles.c",
    "attention.c",
    "scores.c",
    "elementwise.c",
    "layers.c",
    "largest.c",
    "grading.c",
    "growth.c",
)
HEADERS = ("vectors.h", "exponential.h", "kernels.h", "visible.h", "amx.h")
# contraction gives one multiply-add the same rounding in every kernel; nothing else of IEEE is given up
FLAGS = (
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fopenmp",
    "-fPIC",
    "-shared",
    "-Wno-psabi",
    "-std=gnu11",
)
LONGEST = 120.0  # seconds for the compiler


def library() -> ctypes.CDLL | None:
    """The kernels, or None where they cannot be had."""
    return _loaded()[0]


def why_not() -> str | None:
    """The reason for None, in a few words."""
    return _loaded()[1]


def identity() -> str:
    """Tells kernels of other sources, compilers and processors apart: their file's name, or the reason for None."""
    kernels = library()
    return why_not() or "" if kernels is None else Path(kernels._name).stem


@functools.cache
def _loaded() -> tuple[ctypes.CDLL | None, str | None]:
    if os.environ.get(SWITCH) == "0":
        return None, f"{SWITCH} is 0"
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if compiler is None:
        return None, "no C compiler"
    try:
        return _declared(_opened(compiler)), None
    except subprocess.CalledProcessError as error:
        return None, f"{compiler} failed: {(error.stderr or b'').decode(errors='replace').strip()[:200]}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)


def _opened(compiler: str) -> ctypes.CDLL:
    """Compile unless the very same library is there already, whole: a name ends in its content's hash, because half a
    library ends the process that loads it. Raises OSError or a subprocess error."""
    here, place = Path(__file__).parent, cache_root() / "native"
    parts = [(here / name).read_bytes() for name in (*SOURCES, *HEADERS)]
    parts += [" ".join(FLAGS).encode(), _processor().encode(), _version(compiler), torch.__version__.encode()]
    start = f"kernels-{hashlib.sha256(b'/'.join(parts)).hexdigest()[:24]}-"
    with contextlib.suppress(OSError):  # of another user, perhaps, or broken: made again
        for path in sorted(place.glob(f"{start}*.so")):
            if path.name == start + _ending(path.read_bytes()):
                return ctypes.CDLL(str(path))
    with tempfile.TemporaryDirectory(prefix="specdec-native-") as work:
        made = Path(work) / "kernels.so"
        command = [compiler, *FLAGS, "-o", str(made), *(str(here / source) for source in SOURCES), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=LONGEST)
        content = made.read_bytes()
        name = start + _ending(content)
        try:
            with replacing(place / name) as fresh:
                fresh.write_bytes(content)
            return ctypes.CDLL(str(place / name))
        except OSError:  # a cache that is full or read-only costs some seconds at every start, no more
            return ctypes.CDLL(str(made.rename(made.with_name(name))))


def _ending(content: bytes) -> str:
    return f"{hashlib.sha256(content).hexdigest()[:16]}.so"


def _processor() -> str:
    """What `-march=native` depends on: machine and instruction sets."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return platform.machine() + line
    return f"{platform.machine()} {platform.processor()} {platform.node()}"


def _version(compiler: str) -> bytes:
    return subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=LONGEST).stdout


def _declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    pointer, whole, small = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    loaded.specdec_linear.argtypes = [pointer] * 4 + [whole] * 3 + [small] * 3
    loaded.specdec_linear.restype = small
    loaded.specdec_tiles_kind.argtypes = []
    loaded.specdec_tiles_kind.restype = small
    loaded.specdec_tiles.argtypes = [pointer] * 4 + [whole] * 3 + [small] * 2
    loaded.specdec_tiles.restype = None
    loaded.specdec_attention.argtypes = [pointer]
    loaded.specdec_attention.restype = small
    loaded.specdec_norm.argtypes = [pointer] * 3 + [whole] * 2 + [ctypes.c_float] + [small] * 2
    loaded.specdec_norm.restype = None
    loaded.specdec_gate.argtypes = [pointer] * 2 + [whole] * 2 + [small] * 2
    loaded.specdec_gate.restype = None
    loaded.specdec_largest.argtypes = [pointer] * 2 + [whole] * 2 + [small] * 2
    loaded.specdec_largest.restype = None
    loaded.specdec_top.argtypes = [pointer] * 3 + [whole] * 3 + [small] * 2
    loaded.specdec_top.restype = None
    loaded.specdec_place.argtypes = [pointer]
    loaded.specdec_place.restype = None
    loaded.specdec_keep.argtypes = [pointer, *[whole] * 5, pointer, pointer, whole]
    loaded.specdec_keep.restype = None
    loaded.specdec_grade.argtypes = [pointer]
    loaded.specdec_grade.restype = small
    loaded.specdec_level.argtypes = [pointer]
    loaded.specdec_level.restype = ctypes.c_double
    loaded.specdec_worth.argtypes = [pointer] * 2 + [whole] * 4
    loaded.specdec_worth.restype = whole
    loaded.specdec_choose.argtypes = [pointer]
    loaded.specdec_choose.restype = None
    loaded.specdec_layers.argtypes = [pointer, whole, pointer]
    loaded.specdec_layers.restype = small
    return loaded
