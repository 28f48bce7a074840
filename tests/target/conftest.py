"""Makes `tiny` importable, and gives the tiny checkpoints of the session."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of a tiny model by architecture; written once, not to be changed."""
    home, made = tmp_path_factory.mktemp("tiny"), dict[str, Path]()

    def get(arch: str) -> Path:
        if arch not in made:
            made[arch] = tiny.save(arch, home)
        return made[arch]

    return get
