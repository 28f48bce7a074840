"""The cache of expensive directories: built once, checked at every start, rebuilt when broken."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from specdec.errors import SpecdecError
from specdec.places import cache_root
from specdec.target.store import MANIFEST, build_once, intact, sha256_of, sha256_once


class Builder:
    """Writes two files and counts how often it is asked."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.calls, self.seconds = 0, seconds

    def __call__(self, place: Path) -> None:
        self.calls += 1
        (place / "a").write_text("first")
        time.sleep(self.seconds)
        (place / "b").write_text("second")


def later(path: Path) -> None:
    """Move the modification time, as a change that keeps the size would."""
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))


def test_builds_once(tmp_path: Path) -> None:
    build = Builder()
    for _ in range(3):
        assert build_once(tmp_path / "x" / "place", build) == tmp_path / "x" / "place"
    assert build.calls == 1
    assert sorted(p.name for p in (tmp_path / "x" / "place").iterdir()) == ["a", "b", MANIFEST]


@pytest.mark.parametrize(
    "harm", ["missing", "truncated", "changed", "no manifest", "broken manifest", "absent"]
)
def test_what_is_broken_is_built_again(tmp_path: Path, harm: str) -> None:
    build, place = Builder(), tmp_path / "place"
    build_once(place, build)
    if harm == "missing":
        (place / "b").unlink()
    elif harm == "truncated":
        (place / "b").write_text("sec")
    elif harm == "changed":
        (place / "b").write_text("SECOND")
        later(place / "b")
    elif harm == "no manifest":
        (place / MANIFEST).unlink()
    elif harm == "broken manifest":
        (place / MANIFEST).write_text('{"a": {"size": 5}}')
    else:
        place.rename(tmp_path / "elsewhere")
    assert not intact(place)
    build_once(place, build)
    assert intact(place) and build.calls == 2
    assert (place / "b").read_text() == "second"


def test_a_copied_cache_is_hashed_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, place = Builder(), tmp_path / "place"
    build_once(place, build)
    later(place / "a")
    build_once(place, build)
    assert build.calls == 1

    def never(path: Path) -> str:
        raise AssertionError(f"{path} is hashed again")

    monkeypatch.setattr("specdec.target.store.sha256_of", never)
    assert intact(place)


def test_a_builder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fails(place: Path) -> None:
        (place / "a").write_text("half")
        raise SpecdecError("no")

    with pytest.raises(SpecdecError, match="no"):
        build_once(tmp_path / "place", fails)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []


def test_leftovers_of_a_killed_builder_are_swept(tmp_path: Path) -> None:
    left = tmp_path / ".place.killed" / "new"
    left.mkdir(parents=True)
    (left / "a").write_text("half")
    build_once(tmp_path / "place", Builder())
    assert not left.exists() and intact(tmp_path / "place")


def test_of_several_builders_one_works_and_the_others_wait(tmp_path: Path) -> None:
    build, found = Builder(0.1), list[bool]()

    def start() -> None:
        found.append((build_once(tmp_path / "place", build) / "b").read_text() == "second")

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4 and build.calls == 1


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecdecError, match="SPECDEC_CACHE"):
        build_once(tmp_path / "file" / "place", Builder())


def test_a_disk_that_is_full_while_building_says_so_and_keeps_nothing(tmp_path: Path) -> None:
    def fills(place: Path) -> None:
        (place / "a").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(SpecdecError, match=r"cannot be written.*No space left.*Free some space"):
        build_once(tmp_path / "place", fills)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []


def test_cache_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("SPECDEC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "specdec"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "specdec"


def test_a_remembered_digest_follows_the_file(tmp_path: Path) -> None:
    path, memo = tmp_path / "f", tmp_path / "memo"
    path.write_text("one")
    first = sha256_once(path, memo)
    assert first == sha256_once(path, memo) == sha256_of(path)
    path.write_text("two")
    later(path)
    assert sha256_once(path, memo) == sha256_of(path) != first
    next(memo.iterdir()).write_text("{")
    assert sha256_once(path, memo) == sha256_of(path)
