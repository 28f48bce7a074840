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
from torch import Tensor

from specdec.attention.protocol import Rows
from specdec.cache import KVCache
from specdec.drafting.protocol import Shape
from specdec.engine.build import Options, make_engine
from specdec.generate import SpecDecoder
from specdec.server.limits import ServerLimits
from specdec.server.listen import DrainingServer, make_server
from specdec.server.state import ServerState
from specdec.target.load import LoadedTarget
from specdec.target.protocol import States, Target

MODEL = "tiny-llama"
LENGTH = 256
TREE = Shape(depth=4, width=3, nodes=12)


@dataclass(frozen=True, slots=True)
class Live:
    """A server that listens on `url`, run by `thread`; `web` is a client with connections of its own."""

    url: str
    web: httpx.Client
    state: ServerState
    server: DrainingServer
    thread: threading.Thread

    def client(self, **more: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **more})


class EngineDies(BaseException):
    """Not an Exception: nothing in the engine stops it."""


class TroubledTarget:
    """A target that is slow, or meets trouble at certain tokens.

    Args:
        inner: does the work.
        trouble: token that makes logits NaN, token that kills the engine, seconds every forward takes longer.
    """

    def __init__(self, inner: Target, trouble: Trouble) -> None:
        self.inner, self.trouble, self.info = inner, trouble, inner.info

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def forward(self, tokens: Tensor, rows: Rows, cache: KVCache, taps: tuple[int, ...]) -> States:
        time.sleep(self.trouble.delay)
        if bool((tokens == self.trouble.fatal).any()):
            raise EngineDies
        states = self.inner.forward(tokens, rows, cache, taps)
        poisoned = (tokens == self.trouble.poison).any(dim=1)
        return States(states.final.masked_fill(poisoned[:, None, None], torch.nan), states.features)


@dataclass(frozen=True, slots=True)
class Trouble:
    poison: int = -1
    fatal: int = -1
    delay: float = 0.0


@dataclass(frozen=True, slots=True)
class Setup:
    """What differs between servers."""

    slots: int = 3
    api_key: str | None = None
    limits: ServerLimits = field(default_factory=ServerLimits)
    trouble: Trouble = field(default_factory=Trouble)
    burst: bool = False


def options(slots: int) -> Options:
    return Options(dtype=torch.float32, device="cpu", slots=slots, max_length=LENGTH, tree=TREE)


def load(directory: Path) -> SpecDecoder:
    """A decoder in float32 that drafts by n-grams over a fixed tree."""
    return SpecDecoder.from_pretrained(str(tiny.save("llama", directory)), "ngram", options(3))


@contextmanager
def running(decoder: SpecDecoder, setup: Setup) -> Iterator[Live]:
    """A live server with an engine of its own over the weights of `decoder`."""
    target: Any = TroubledTarget(decoder.loaded.target, setup.trouble)
    loaded = LoadedTarget(target, decoder.tokenizer, decoder.loaded.files)
    own = SpecDecoder(loaded, make_engine(target, "ngram", options(setup.slots)))
    state = ServerState(own, MODEL, setup.limits, setup.api_key, setup.burst)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = make_server(state, "127.0.0.1", 0)
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
        thread.start()
        assert until(lambda: server.started), "the server did not start"
        try:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            with httpx.Client(
                base_url=url, timeout=60, verify=False
            ) as web:  # reading certificates takes its time
                yield Live(url, web, state, server, thread)
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
