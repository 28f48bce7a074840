"""A tiny target, a head for it, and a directory to work in."""

from __future__ import annotations

from pathlib import Path

import engines
import pytest

from specdec.head.model import DraftHead
from specdec.target.protocol import Target


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    """The tiny Llama of the other tests: 8 layers, 128 tokens."""
    return engines.load(tmp_path_factory.mktemp("surplus"), "llama", "lean")


@pytest.fixture(scope="session")
def head(target: Target) -> DraftHead:
    """A random head on taps 1, 4 and 6 that drafts most of the vocabulary."""
    made = engines.random_head(target, range(3, 123))
    made.freeze()
    return made


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A working directory."""
    return tmp_path / "work"
