"""A thread that runs an engine: requests go in from any thread, pieces come out through callbacks.

The event loop of a server never waits for a round; it hands over a request and is called back. Knows nothing of HTTP.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from specdec.engine.engine import Engine
from specdec.engine.request import Piece, Request, check_request
from specdec.errors import SpecdecError
from specdec.native.workers import release_workers

Deliver = Callable[[Piece], None]


class EngineWorker:
    """Owns an engine; only its thread touches it.

    Args:
        engine: must not be used by anyone else while the worker lives.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._inbox: deque[tuple[Request, Deliver]] = deque()
        self._cancels: deque[str] = deque()
        self._deliver: dict[str, Deliver] = {}
        self._wake = threading.Event()
        self._door = threading.Lock()  # nothing enters the inbox once the thread has decided to end
        self._closing = False
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="specdec-engine", daemon=True)

    def start(self) -> None:
        """Begin running rounds. Whoever starts it has loaded the model, and has no more to compute."""
        release_workers()
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self.failure is None

    @property
    def load(self) -> tuple[int, int]:
        """(running, waiting) requests."""
        return len(self.engine.active), len(self.engine.waiting) + len(self._inbox)

    def submit(self, request: Request, deliver: Deliver) -> None:
        """Queue a request; `deliver` is called from the engine's thread with each of its pieces.

        Raises:
            RequestError: when it can never be served (checked here, in the caller's thread).
            SpecdecError: when the worker is closing or its engine has failed.
        """
        check_request(request, self.engine.limits.length, self.engine.target.info.vocab)
        with self._door:
            if self.failure is not None:
                raise SpecdecError(f"has failed: {self.failure}", field="engine", remedy="Start it again.")
            if self._closing:
                raise SpecdecError("is shutting down", field="engine")
            self._inbox.append((request, deliver))
        self._wake.set()

    def cancel(self, request_id: str) -> None:
        """End a request before the next round; its last piece says "cancelled"."""
        self._cancels.append(request_id)
        self._wake.set()

    def close(self, timeout: float | None = None) -> bool:
        """Finish what is queued and running, then stop; True when the thread ended in time."""
        with self._door:
            self._closing = True
        self._wake.set()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:  # the engine is gone: tell everyone who waits
            with self._door:
                self.failure = error
                self._deliver |= {request.id: deliver for request, deliver in self._inbox}
                self._inbox.clear()
            for request_id in [*self._deliver]:
                self._hand_over(Piece(request_id, (), (), (), "error", f"the engine failed: {error}"))
            raise

    def _turn(self) -> bool:
        """Take what arrived, run one step; False when closed and idle."""
        self._wake.clear()
        # read first: whoever is cancelled was submitted before, and the engine forgets ids it does not know
        cancelled = [self._cancels.popleft() for _ in range(len(self._cancels))]
        while self._inbox:
            request, deliver = self._inbox.popleft()
            self._deliver[request.id] = deliver
            self.engine.add(request)
        for request_id in cancelled:
            self.engine.cancel(request_id)
        if not self.engine.busy:
            with self._door:
                if self._closing and not self._inbox:
                    return False
            self._wake.wait(timeout=1.0)
            return True
        for piece in self.engine.step():
            self._hand_over(piece)
        return True

    def _hand_over(self, piece: Piece) -> None:
        """Call back; a callback that fails loses its own request and nobody else's."""
        deliver = self._deliver.get(piece.request)
        if deliver is None:
            return
        if piece.finish:
            del self._deliver[piece.request]
        try:
            deliver(piece)
        except Exception:
            self._deliver.pop(piece.request, None)
            self.engine.cancel(piece.request)
