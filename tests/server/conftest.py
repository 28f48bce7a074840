"""One tiny decoder and one live server for the session, and a maker of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    import httpx
    import openai
    import serving

    from specdec.generate import SpecDecoder

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "llguidance", "openai", "httpx")
collect_ignore_glob = [] if all(map(find_spec, NEEDED)) else ["test_*.py"]  # the extras serve and dev


def pytest_configure(config: pytest.Config) -> None:
    """Tests of the page need a browser."""
    config.addinivalue_line("markers", "browser: needs Chromium through Playwright")


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> SpecDecoder:
    """For offline answers: the live servers have engines of their own over its weights."""
    import serving

    torch.set_num_threads(1)
    return serving.load(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def serve(decoder: SpecDecoder) -> Callable[..., AbstractContextManager[serving.Live]]:
    """Start a server: `with serve(slots=1, api_key="x") as live`."""

    import serving

    def start(**setup: Any) -> AbstractContextManager[serving.Live]:
        return serving.running(decoder, serving.Setup(**setup))

    return start


@pytest.fixture(scope="session")
def live(decoder: SpecDecoder) -> Iterator[serving.Live]:
    """The session's server."""
    import serving

    with serving.running(decoder, serving.Setup(slots=4)) as one:
        yield one


@pytest.fixture
def client(live: serving.Live) -> Iterator[openai.OpenAI]:
    """The official client, talking to the session's server."""
    with live.client() as made:
        yield made


@pytest.fixture
def http(live: serving.Live) -> httpx.Client:
    """A plain HTTP client, talking to the session's server."""
    return live.web
