"""One HTTP call's sequences on their way through the engine: events come out in order, leaving cancels what runs.

The bridge between the engine's thread and the event loop: pieces are handed over with `call_soon_threadsafe`, and
nobody waits for anybody. Knows nothing of JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from specdec.engine.request import Piece, Request
from specdec.server.deadline import Deadline
from specdec.server.errors import ApiError
from specdec.server.events import Event, Step
from specdec.server.pacing import Pacer

CANCELLED = "the request was cancelled"


class Engine(Protocol):
    """What a call needs of the engine's worker."""

    def submit(self, request: Request, deliver: Callable[[Piece], None]) -> None: ...

    def cancel(self, request_id: str) -> None: ...


class Observer(Protocol):
    """Hears of every piece in the engine's thread, before the client does."""

    def observe(self, request: Request, piece: Piece) -> Step | None: ...


@dataclass(eq=False)
class Call:
    """The sequences of one HTTP request.

    Args:
        requests: one per sequence, not yet submitted.
        engine: runs them.
        observer: hears of their pieces.
        closed: called in the event loop each time a sequence has left the engine.
        deadline: for the last token.
        evenly: tokens come at an even pace instead of a round's at once (see `pacing`).
    """

    requests: Sequence[Request]
    engine: Engine
    observer: Observer
    closed: Callable[[], None]
    deadline: Deadline
    evenly: bool = False
    steps: dict[int, list[Step]] = field(default_factory=dict)
    _queue: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    _pacers: list[Pacer] = field(default_factory=list)
    _open: set[int] = field(default_factory=set)

    def submit(self) -> None:
        """Hand every sequence to the engine. Raises what the engine refuses with; nothing runs then."""
        loop = asyncio.get_running_loop()
        self._pacers = [Pacer(self._queue.put_nowait, loop) for _ in self.requests if self.evenly]
        try:
            for index, request in enumerate(self.requests):
                self.engine.submit(request, self._receiver(index, request, loop))
                self._open.add(index)
        except BaseException:
            self.cancel()
            raise

    def _receiver(
        self, index: int, request: Request, loop: asyncio.AbstractEventLoop
    ) -> Callable[[Piece], None]:
        """A callback for the engine's thread; it must never fail there."""
        told = 0

        def deliver(piece: Piece) -> None:
            nonlocal told
            step = self.observer.observe(request, piece)
            logprobs = tuple(request.logprobs[told : told + len(piece.tokens)])
            told += len(piece.tokens)
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody is left to listen
                loop.call_soon_threadsafe(self._arrive, Event(index, piece, logprobs), step)

        return deliver

    def _arrive(self, event: Event, step: Step | None) -> None:
        if step is not None:
            self.steps.setdefault(event.index, []).append(step)
        if event.piece.finish:
            self._open.discard(event.index)
            self.closed()
        if self._pacers:
            self._pacers[event.index].push(event)
        else:
            self._queue.put_nowait(event)

    @property
    def running(self) -> int:
        """Sequences that are still in the engine."""
        return len(self._open)

    def cancel(self) -> None:
        """End what still runs before the next round."""
        for index in self._open:
            self.engine.cancel(self.requests[index].id)

    async def events(self, keep_alive: float | None = None) -> AsyncGenerator[Event | None, None]:
        """Events until every sequence has ended; None after `keep_alive` seconds of silence.

        Closing the generator cancels what still runs.

        Raises:
            ApiError: 504 when the time is over, 500 when a sequence failed in the engine.
        """
        left = len(self.requests)
        try:
            while left:
                event = await self._next(keep_alive)
                if event is not None:
                    _check(event.piece)
                    left -= event.piece.finish is not None
                yield event
        finally:
            self.cancel()

    async def _next(self, keep_alive: float | None) -> Event | None:
        left = self.deadline.left
        patience = left if keep_alive is None else min(left, keep_alive)
        try:
            async with asyncio.timeout(patience):
                return await self._queue.get()
        except TimeoutError:
            if not self.deadline.left:
                for pacer in self._pacers:
                    pacer.flush()
                if not self._queue.empty():
                    return self._queue.get_nowait()
                raise self.deadline.missed() from None
            return None


def _check(piece: Piece) -> None:
    """Raises ApiError when the sequence ended without an answer."""
    if piece.finish == "error":
        raise ApiError(500, piece.error or "the engine failed", code="generation_failed")
    if piece.finish == "cancelled":
        raise ApiError(503, CANCELLED, code="cancelled", retry_after=1)
