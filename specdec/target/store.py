"""Directories that are expensive to make: built once under the cache, found broken and built again.

Knows files, sizes and hashes; not what is in them. A directory appears under its name only when it is whole,
and carries a manifest by which every later start checks it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

from specdec.errors import SpecdecError
from specdec.places import replacing

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Seal:
    """What one file was when it was written: bytes, modification time in ns, sha256 as hex."""

    size: int
    mtime: int
    sha256: str


def sha256_of(path: Path) -> str:
    """The file's sha256 as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_once(path: Path, memo: Path) -> str:
    """`sha256_of`, remembered in the directory `memo` for as long as size and modification time stay."""
    note = memo / (hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32] + ".json")
    stat = path.stat()
    with suppress(OSError, ValueError, TypeError):
        known = Seal(**json.loads(note.read_text()))
        if (known.size, known.mtime) == (stat.st_size, stat.st_mtime_ns):
            return known.sha256
    seal = Seal(stat.st_size, stat.st_mtime_ns, sha256_of(path))
    with suppress(OSError):  # a memo that cannot be kept costs time, nothing else
        memo.mkdir(parents=True, exist_ok=True)
        _replace(note, json.dumps(asdict(seal)))
    return seal.sha256


def build_once(place: Path, build: Callable[[Path], None]) -> Path:
    """`place`, intact; made by `build(empty directory)` if it is absent or broken.

    Of several processes one builds and the others wait. The one that dies half way leaves nothing that is
    mistaken for the whole.

    Raises:
        SpecdecError: the cache cannot be written: an OSError, of `build` too. Whatever else that raises passes through.
    """
    if intact(place):
        return place
    try:
        with _alone(place):
            if not intact(place):  # not built by another while we waited
                _build(place, build)
    except OSError as error:
        raise SpecdecError(f"the cache cannot be written: {error}", field="cache", value=str(place.parent),
                           remedy="Free some space, or set SPECDEC_CACHE to a directory of yours."
                           ) from error  # fmt: skip
    return place


def intact(place: Path) -> bool:
    """Whether every file of the manifest is there and unchanged.

    Sizes are compared always; contents only where a modification time is not the recorded one (a copied or
    restored cache), and the new times are then recorded.
    """
    try:
        seals = {name: Seal(**seal) for name, seal in json.loads((place / MANIFEST).read_text()).items()}
        fresh = {name: _recheck(place / name, seal) for name, seal in seals.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return False
    if fresh != seals:
        with suppress(OSError):  # a read-only cache is hashed at every start
            _write_manifest(place, fresh)
    return True


def _recheck(path: Path, seal: Seal) -> Seal:
    """The seal with today's modification time; ValueError if the contents differ."""
    stat = path.stat()
    if stat.st_size != seal.size:
        raise ValueError(path)
    if stat.st_mtime_ns != seal.mtime and sha256_of(path) != seal.sha256:
        raise ValueError(path)
    return Seal(seal.size, stat.st_mtime_ns, seal.sha256)


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.parent / f"{place.name}.lock"):
        yield


def _build(place: Path, build: Callable[[Path], None]) -> None:
    prefix = f".{place.name}."
    for leftover in place.parent.glob(prefix + "*"):  # of a builder that was killed: we hold its lock
        shutil.rmtree(leftover, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=place.parent))
    try:
        new, old = work / "new", work / "old"
        new.mkdir()
        build(new)
        _write_manifest(new, {path.name: _seal(path) for path in sorted(new.iterdir())})
        if place.exists():  # broken, perhaps still mapped by a running process: moved away, not written over
            place.rename(old)
        new.rename(place)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _seal(path: Path) -> Seal:
    with path.open("rb+") as file:
        os.fsync(file.fileno())  # the rename must not reach the disk before the contents
    stat = path.stat()
    return Seal(stat.st_size, stat.st_mtime_ns, sha256_of(path))


def _write_manifest(place: Path, seals: dict[str, Seal]) -> None:
    _replace(place / MANIFEST, json.dumps({name: asdict(seal) for name, seal in seals.items()}, indent=1))


def _replace(path: Path, text: str) -> None:
    with replacing(path) as fresh:
        fresh.write_text(text)
