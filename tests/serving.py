"""Servers over a tiny random Llama: loading it, starting one in a thread, waiting for what it does."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import tiny
import torch

from specdec.drafting.protocol import Shape
from specdec.generate import Options, SpecDecoder
from specdec.server.limits import ServerLimits
from specdec.server.listen import DrainingServer, make_server
from specdec.server.state import ServerState

MODEL = "tiny-llama"
LENGTH = 256
TREE = Shape(depth=4, width=3, nodes=12)


@dataclass(frozen=True, slots=True)
class Live:
    """A server that listens on `url`, run by `thread`."""

    url: str
    state: ServerState
    server: DrainingServer
    thread: threading.Thread

    def client(self, **more: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **more})

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30)


@dataclass(frozen=True, slots=True)
class Setup:
    """What differs between servers; `change` may spoil the state before it starts."""

    slots: int = 3
    api_key: str | None = None
    limits: ServerLimits = field(default_factory=ServerLimits)
    change: Callable[[ServerState], None] | None = None


def options(slots: int) -> Options:
    return Options(dtype=torch.float32, device="cpu", slots=slots, max_length=LENGTH, tree=TREE)


def load(directory: Path) -> SpecDecoder:
    """A decoder in float32 that drafts by n-grams over a fixed tree."""
    return SpecDecoder.from_pretrained(str(tiny.save("llama", directory)), "ngram", options(3))


@contextmanager
def running(decoder: SpecDecoder, setup: Setup) -> Iterator[Live]:
    """A live server with an engine of its own over the weights of `decoder`."""
    own = decoder.with_drafter("ngram", options(setup.slots))
    state = ServerState(own, MODEL, setup.limits, setup.api_key)
    if setup.change is not None:
        setup.change(state)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = make_server(state, "127.0.0.1", 0)
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
        thread.start()
        assert until(lambda: server.started), "the server did not start"
        try:
            yield Live(f"http://127.0.0.1:{listener.getsockname()[1]}", state, server, thread)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive(), "the server did not end"


def until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Wait for a condition; False when it does not come true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True
