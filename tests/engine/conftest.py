"""Tiny targets by architecture and backend, loaded once per session."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import engines
import pytest

from specdec.target.protocol import Target

Get = Callable[[str, Literal["lean", "adapter"]], Target]


@pytest.fixture(scope="session")
def target_of(tmp_path_factory: pytest.TempPathFactory) -> Get:
    """(architecture, backend) -> target."""
    home, loaded = tmp_path_factory.mktemp("targets"), dict[tuple[str, str], Target]()

    def get(arch: str, backend: Literal["lean", "adapter"] = "lean") -> Target:
        if (arch, backend) not in loaded:
            loaded[arch, backend] = engines.load(home, arch, backend)
        return loaded[arch, backend]

    return get
