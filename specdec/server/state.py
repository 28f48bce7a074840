"""A running server: the decoder, its engine's thread, the limits, who is inside, whether it still takes requests."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import ParamSpec, TypeVar

from fastapi import Request as HttpRequest

from specdec.engine.request import Request
from specdec.engine.worker import EngineWorker
from specdec.errors import RequestError, SpecdecError
from specdec.generate import SpecDecoder
from specdec.server.calls import Call
from specdec.server.deadline import Deadline
from specdec.server.disconnect import race
from specdec.server.errors import ApiError
from specdec.server.grammar import Grammars
from specdec.server.limits import ServerLimits
from specdec.server.metrics import Metrics
from specdec.server.reading import Reader
from specdec.target.vocabulary import Vocabulary

P = ParamSpec("P")
T = TypeVar("T")
SECONDS_PER_SEQUENCE = 1.0  # a rough guess behind Retry-After; clients back off on their own as well


@dataclass(eq=False)
class ServerState:
    """What all routes share.

    Args:
        decoder: a loaded target with a drafter; nobody else may use its engine meanwhile.
        name: the model's name on the wire.
        limits: see `ServerLimits`.
        api_key: asked for under /v1/, or None.
        burst: streams get what a round accepted at once, instead of evenly (see `pacing`).
    """

    decoder: SpecDecoder
    name: str
    limits: ServerLimits = field(default_factory=ServerLimits)
    api_key: str | None = None
    burst: bool = False
    draining: bool = False
    inside: int = 0
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        engine = self.decoder.engine
        self.worker = EngineWorker(engine)
        self.metrics = Metrics(self.worker, self.name)
        engine.watcher = self.metrics
        self.vocabulary = Vocabulary(self.decoder.tokenizer, engine.target.info.vocab)
        self.grammars = Grammars(self.vocabulary, engine.target.info.stop_ids)
        self.reader = Reader(self.decoder, self.vocabulary)
        # one thread: a tokenizer is not made to be shared, and prompts must not queue behind each other's rounds
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="specdec-tokenizer")

    @property
    def length(self) -> int:
        """Context length in tokens."""
        return self.decoder.engine.limits.length

    @property
    def healthy(self) -> bool:
        return self.worker.alive and not self.draining

    @contextmanager
    def arriving(self, sequences: int) -> Iterator[Deadline]:
        """Their room is taken while prompt and grammar are read; their time begins. Raises as `check_room`."""
        self.check_room(sequences)
        self.inside += sequences
        try:
            yield Deadline(self.limits.request_seconds)
        finally:
            self.inside -= sequences

    async def read(
        self, http: HttpRequest, deadline: Deadline, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run tokenizer or grammar work off the event loop, one after another. Raises ApiError: 504 when it is too
        late; as `race` when the client leaves: what has not begun then never does."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(deadline.left):
                return await race(http, loop.run_in_executor(self._thread, partial(work, *args, **kwargs)))
        except TimeoutError:
            raise deadline.missed() from None

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 for a model that is not served here."""
        if name is not None and name != self.name:
            message = f"the model {name!r} does not exist; this server has {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def check_room(self, sequences: int) -> None:
        """Raises ApiError: 400 for more sequences than ever fit, 429 when full, 503 when closing or broken."""
        if not self.worker.alive:
            raise ApiError(503, "the engine has stopped; restart the server", code="engine_stopped")
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5)
        slots = self.decoder.engine.limits.slots
        most = slots + self.limits.queue
        if sequences > most:
            message = (
                f"{sequences} sequences in one request; this server takes at most {most} (slots + queue)"
            )
            raise ApiError(400, message, param="n", code="too_many_sequences")
        if self.inside + sequences > most:
            wait = math.ceil((self.inside + sequences - most) / slots * SECONDS_PER_SEQUENCE)
            raise ApiError(429, "the queue is full; try again later", code="queue_full", retry_after=wait)

    def start(self, requests: Sequence[Request], deadline: Deadline, *, stream: bool = False) -> Call:
        """Queue the sequences of one HTTP request, for which there was room on arrival; `stream` when its tokens are
        sent as they come. Raises ApiError: 400 when one can never be served, 503 when the engine has stopped."""
        for request in requests:
            request.arrived = deadline.arrived
        evenly = stream and not self.burst
        call = Call(requests, self.worker, self.metrics, self._closed, deadline, evenly)
        before = self.inside
        self.inside += len(requests)
        try:
            call.submit()
        except RequestError as error:
            self.inside = before + call.running
            raise ApiError.of(error) from None
        except SpecdecError as error:
            self.inside = before + call.running
            raise ApiError(503, str(error), code="engine_stopped") from None
        return call

    def _closed(self) -> None:
        self.inside -= 1

    async def close(self) -> bool:
        """Finish what runs, then stop the engine; True when it ended within the drain time."""
        self.draining = True
        done = await asyncio.to_thread(self.worker.close, self.limits.drain_seconds)
        self._thread.shutdown(wait=False, cancel_futures=True)
        return done
