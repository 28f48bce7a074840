"""Whether a directory can be made and written into: asked before anything costly is done for it.

Knows the file system only by trying; permissions alone do not tell (root, read-only mounts, /proc).
"""

from __future__ import annotations

import tempfile
from contextlib import suppress
from itertools import takewhile
from pathlib import Path

from specdec.errors import RequestError


def check_writable(directory: Path, field: str = "out") -> None:
    """Make the directory and a file in it, and take both away again; what was there stays.

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
