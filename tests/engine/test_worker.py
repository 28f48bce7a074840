"""The engine's thread: requests from anywhere, cancellation, draining, and a failure that everybody hears of."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

import engines
import pytest
from toy import FakeDrafter, ToyTarget, neighbours

from specdec.drafting.protocol import Shape
from specdec.engine.engine import Engine, Limits
from specdec.engine.request import Piece, Request
from specdec.engine.worker import EngineWorker
from specdec.errors import RequestError, SpecdecError
from specdec.sampling import Sampling

PATIENCE = 60.0  # seconds; a busy machine is slow, a hang is for ever


class Listener:
    """Collects the pieces of one request and knows when the last has come."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.begun, self.ended = threading.Event(), threading.Event()

    def __call__(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self.begun.set()
        if piece.finish:
            self.ended.set()

    @property
    def tokens(self) -> list[int]:
        return [t for piece in self.pieces for t in piece.tokens]

    def finish(self) -> str | None:
        assert self.ended.wait(PATIENCE), "no last piece"
        return self.pieces[-1].finish


def _engine(slots: int = 2) -> Engine:
    return engines.engine(ToyTarget(), FakeDrafter(neighbours), Shape(2, 3, 10), Limits(slots, 512))


def _request(name: str, tokens: int = 10) -> Request:
    return engines.request(name, (3, 4), Sampling(temperature=1.0, seed=int(name), max_tokens=tokens))


def _alone(name: str, tokens: int = 10) -> list[int]:
    request = _request(name, tokens)
    engines.run(_engine(1), [request])
    return request.output


def test_requests_of_many_threads_get_their_own_answers() -> None:
    worker = EngineWorker(_engine())
    worker.start()
    listeners = {str(i): Listener() for i in range(6)}
    threads = [
        threading.Thread(target=worker.submit, args=(_request(n), heard)) for n, heard in listeners.items()
    ]
    for thread in threads:
        thread.start()
    for name, heard in listeners.items():
        assert heard.finish() == "length"
        assert heard.tokens == _alone(name)
    assert worker.alive
    assert worker.close(PATIENCE)
    assert not worker.alive
    assert worker.failure is None


def test_cancel_ends_one_request() -> None:
    worker, heard, other = EngineWorker(_engine()), Listener(), Listener()
    worker.start()
    worker.submit(_request("1", 500), heard)
    worker.submit(_request("2"), other)
    assert heard.begun.wait(PATIENCE)
    worker.cancel("1")
    worker.cancel("nobody")
    assert heard.finish() == "cancelled"
    assert len(heard.tokens) < 500
    assert other.finish() == "length"
    assert worker.close(PATIENCE)


def test_a_request_that_comes_and_goes_within_a_turn_is_cancelled() -> None:
    worker, heard = EngineWorker(_engine()), Listener()

    class Inbox(deque[Any]):
        """Another thread gets in just after the inbox was found empty."""

        def __bool__(self) -> bool:
            found = len(self) > 0
            if not found and heard.pieces == [] and worker.load == (1, 0):
                worker.submit(_request("1", 500), heard)
                worker.cancel("1")
            return found

    worker.submit(_request("2", 500), Listener())
    worker._turn()
    worker._inbox = Inbox()
    for _ in range(3):
        worker._turn()
    assert heard.finish() == "cancelled"


def test_close_drains_what_was_queued_and_then_refuses() -> None:
    worker = EngineWorker(_engine(1))
    listeners = [Listener() for _ in range(3)]
    for i, heard in enumerate(listeners):
        worker.submit(_request(str(i), 20), heard)
    assert worker.load == (0, 3)
    worker.start()
    assert worker.close(PATIENCE)
    assert [heard.finish() for heard in listeners] == ["length"] * 3
    with pytest.raises(SpecdecError, match="shutting down"):
        worker.submit(_request("9"), Listener())


def test_what_can_never_be_served_is_refused_in_the_callers_thread() -> None:
    with pytest.raises(RequestError, match="past the context"):
        EngineWorker(_engine()).submit(_request("1", 511), Listener())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_everybody_hears_of_a_dead_engine() -> None:
    engine = _engine(1)
    worker, listeners = EngineWorker(engine), [Listener() for _ in range(3)]

    def broken() -> list[Piece]:
        worker.submit(_request("2"), listeners[2])  # arrives while the engine dies
        raise MemoryError("out of memory")

    engine.step = broken  # type: ignore[method-assign]
    for i in range(2):
        worker.submit(_request(str(i)), listeners[i])
    worker.start()
    assert [heard.finish() for heard in listeners] == ["error"] * 3
    assert all("out of memory" in (heard.pieces[-1].error or "") for heard in listeners)
    assert worker.close(PATIENCE)
    assert not worker.alive
    with pytest.raises(SpecdecError, match="has failed: out of memory"):
        worker.submit(_request("9"), Listener())


def test_a_callback_that_fails_loses_only_its_own_request() -> None:
    def gone(piece: Piece) -> None:
        raise RuntimeError("the client has left")

    worker, heard = EngineWorker(_engine(1)), Listener()
    worker.start()
    worker.submit(_request("1", 500), gone)
    worker.submit(_request("2"), heard)
    assert heard.finish() == "length"
    assert heard.tokens == _alone("2")
    assert worker.close(PATIENCE)
