"""The compiled library: where it is kept, what makes it another one, and what is said when there is none."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from specdec.attention.native import NativeAttention
from specdec.attention.protocol import chunk_rows
from specdec.cache import CacheShape, KVCache
from specdec.errors import UnsupportedError
from specdec.layers.linear import packing_of
from specdec.native import library


@pytest.fixture(autouse=True)
def _afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test finds the kernels for itself, quickly compiled, and leaves none of its own behind."""
    quick = ("-O0" if flag == "-O3" else flag for flag in library.FLAGS)
    monkeypatch.setattr(library, "FLAGS", tuple(quick))
    library._loaded.cache_clear()
    yield
    library._loaded.cache_clear()


def _compiler(place: Path, script: str) -> Path:
    path = place / "cc"
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_switched_off_means_none_and_torch_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.SWITCH, "0")
    assert library.library() is None and library.why_not() == "SPECDEC_NATIVE is 0"
    assert packing_of(torch.zeros(4, 4)) != "native"
    cache = KVCache(CacheShape(1, 1, 16, torch.float32, torch.device("cpu")), 1, 4)
    with pytest.raises(UnsupportedError, match="SPECDEC_NATIVE"):
        NativeAttention().plan(chunk_rows(torch.tensor([0]), torch.tensor([0]), 1), cache, None)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    assert library.library() is None and library.why_not() == "no C compiler"


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = _compiler(
        tmp_path, '[ "$1" = --version ] && echo 1 && exit 0\necho strange option >&2\nexit 1\n'
    )
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    assert library.library() is None
    assert "strange option" in (library.why_not() or "")
    assert not any((tmp_path / "cache").rglob("*"))


def test_what_was_compiled_is_found_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    if library.library() is None:
        pytest.skip(f"no kernels: {library.why_not()}")
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "native").iterdir()}
    library._loaded.cache_clear()
    assert library.library() is not None
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "native").iterdir()} == first and len(
        first
    ) == 1


def test_other_kernels_have_another_identity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    if library.library() is None:
        pytest.skip(f"no kernels: {library.why_not()}")
    first = library.identity()
    assert (tmp_path / "native" / f"{first}.so").exists()
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-DOTHER"))
    library._loaded.cache_clear()
    assert library.identity() not in ("", first)
    monkeypatch.setenv("SPECDEC_NATIVE", "0")
    library._loaded.cache_clear()
    assert library.identity() == "SPECDEC_NATIVE is 0"


@pytest.mark.parametrize("half", [0, 5_000, -1])
def test_half_a_library_is_made_again(half: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "other"))
    if library.library() is None:
        pytest.skip(f"no kernels: {library.why_not()}")
    (whole,) = (tmp_path / "other" / "native").iterdir()
    (tmp_path / "native").mkdir()
    broken = tmp_path / "native" / whole.name  # not the file that this process has loaded
    broken.write_bytes(whole.read_bytes()[:half])
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    library._loaded.cache_clear()
    assert library.library() is not None
    assert broken.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("refused", ["no place", "no file", "no bytes"])
def test_a_cache_that_cannot_be_written_costs_only_time(
    refused: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    work, cache = tmp_path / "work", tmp_path / "cache"
    work.mkdir()
    (cache / "native").mkdir(parents=True)
    monkeypatch.setattr(library.tempfile, "tempdir", str(work))
    monkeypatch.setenv("SPECDEC_CACHE", "/proc/nowhere" if refused == "no place" else str(cache))
    write = Path.write_bytes

    def refuse(path: Path, content: bytes) -> int:
        """As a folder of another's, or a full disk, does."""
        if path.is_relative_to(cache):
            if refused == "no bytes":
                write(path, content[:100])
            raise OSError(refused)
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", refuse)
    if library.library() is None:
        assert library.why_not() == "no C compiler"
        pytest.skip("no C compiler")
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_others_may_read_what_was_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    if library.library() is None:
        pytest.skip(f"no kernels: {library.why_not()}")
    plain = tmp_path / "plain"
    plain.touch()
    (kept,) = (tmp_path / "native").iterdir()
    assert stat.S_IMODE(kept.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
