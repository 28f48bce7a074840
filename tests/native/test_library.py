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
    assert list((tmp_path / "cache" / "native").iterdir()) == []


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


def test_a_cache_that_cannot_be_written_costs_only_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setenv("SPECDEC_CACHE", "/proc/nowhere")
    monkeypatch.setattr(library.tempfile, "tempdir", str(tmp_path))
    if library.library() is None:
        pytest.skip(f"no kernels: {library.why_not()}")
    assert any(tmp_path.rglob("kernels-*.so"))
