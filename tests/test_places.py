"""Files are replaced whole or not at all, and a place is tried without leaving a trace."""

from __future__ import annotations

from pathlib import Path

import pytest

from specdec.errors import RequestError
from specdec.places import check_writable, replacing


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    for text in ("first", "second"):
        with replacing(path) as fresh:
            fresh.write_text(text)
            assert fresh.suffix == ".txt"
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_was_there_stays_where_writing_fails(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file.txt"
    path.write_text("whole")
    with pytest.raises(error), replacing(path) as fresh:
        fresh.write_text("ha")
        raise error
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_is_tried_without_a_trace(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="no directory to write into"):
        check_writable(tmp_path / "file" / "below")
