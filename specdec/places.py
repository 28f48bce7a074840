"""Places on disk: where specdec keeps what it can make again (dequantised weights, cost tables, compiled kernels), how
files are replaced whole, and whether a place that a user named can be written to, asked before anything costly.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path

from specdec.errors import RequestError


def cache_root() -> Path:
    """$SPECDEC_CACHE, else specdec under $XDG_CACHE_HOME or ~/.cache. Not created here."""
    if own := os.environ.get("SPECDEC_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "specdec"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write under. In the end it becomes `path` in one step: nobody meets half a file, and what
    was there stays where writing fails. The name is this process's own and keeps the suffix.

    Raises:
        OSError: the disk refuses.
    """
    fresh = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield fresh
        fresh.replace(path)
    except BaseException:
        with suppress(OSError):
            fresh.unlink()
        raise


def check_writable(directory: Path, field: str = "out") -> None:
    """Make the directory and a file in it, and take both away again; what was there stays. Permissions alone do not
    tell (root, read-only mounts).

    Raises:
        RequestError: it cannot be made, or not be written into.
    """
    missing: list[Path] = []
    try:
        missing += takewhile(lambda path: not path.exists(), (directory, *directory.parents))
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise RequestError(f"is no directory to write into: {error.strerror or error}", field=field,
                           value=str(directory), remedy="Choose another one.") from error  # fmt: skip
    finally:
        for path in missing:
            with suppress(OSError):  # not made, or others have written there since
                path.rmdir()
