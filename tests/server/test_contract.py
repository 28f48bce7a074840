"""The table of the contract in specdec/server/README.md names tests that exist, and every test file of the server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import specdec.server

TESTS = Path(__file__).parent.parent
README = Path(specdec.server.__file__).with_name("README.md")


def named() -> list[tuple[Path, str]]:
    """(file, test) of every line of the table; an empty test where the whole file is meant."""
    found = []
    _, table = README.read_text(encoding="utf-8").split("| contract | test |")
    for line in table.splitlines():
        cells = line.rsplit(" | ", 1)
        file = ""
        for place, test in re.findall(r"`([\w/]*)(?:::(\w+))?`", cells[-1]) if len(cells) == 2 else ():
            file = place or file
            found.append((TESTS / ("" if "/" in file else "server") / f"{file}.py", test))
    return found


@pytest.mark.parametrize(("file", "test"), named(), ids=[f"{f.stem}::{t}" for f, t in named()])
def test_it_is_there(file: Path, test: str) -> None:
    wanted = f"def {test}(" if test else "def test_"
    assert wanted in file.read_text(encoding="utf-8")


def test_no_file_is_left_out() -> None:
    ours = {path for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__)}
    assert ours <= {file for file, _ in named()}
