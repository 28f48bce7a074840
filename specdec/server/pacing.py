"""Even streams: a round emits several tokens at once; they leave one after another, as fast as rounds bring them.

Sent at once, a stream of rounds comes in bursts, and a round whose drafts all fail makes its reader wait longer than a
plain round would have. A few tokens that are still waiting then bridge it; for that, text in mid-stream is seen two
or three rounds later than it could be. The first token never waits, and the last one takes everything along, so that an
answer begins and ends when it did. Where rounds bring one token each, nothing waits at all.

Knows events and a clock, nothing of engines.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from specdec.server.events import Event

RECENT = 16  # rounds that tell how fast they come and what they bring
SPREAD = 3.0  # rounds over which waiting tokens are spread
LONGEST = 0.8  # rounds that one token keeps the next waiting; less than one, as rounds also come late
FINEST = 0.015  # seconds: a chunk costs this machine and its reader work, and a screen shows sixty a second
SLOWEST = 0.25  # seconds: rounds that take longer are spread as if they took this


def departure(round_seconds: float, waiting: int) -> tuple[float, int]:
    """When some of the waiting tokens leave: seconds after those before them; and how many.

    >>> departure(0.04, 1), departure(0.04, 4)
    ((0.032, 1), (0.03, 1))
    >>> departure(0.02, 10)  # six milliseconds each would be too fine
    (0.012, 2)
    >>> departure(0.0, 3)
    (0.0, 3)
    """
    if round_seconds <= 0:
        return 0.0, waiting
    seconds = min(round_seconds, SLOWEST) * min(LONGEST, SPREAD / waiting)
    together = min(waiting, max(1, round(FINEST / seconds)))
    return (seconds if together == 1 else min(FINEST, together * seconds)), together


@dataclass(eq=False)
class Pacer:
    """Lets the tokens of one sequence leave evenly.

    Args:
        deliver: takes events, in the event loop.
        loop: tells the time and calls back.
    """

    deliver: Callable[[Event], None]
    loop: asyncio.AbstractEventLoop
    _rounds: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=RECENT))
    _waiting: Event | None = None
    _came: float | None = None
    _left: float = 0.0
    _timer: asyncio.TimerHandle | None = None

    def push(self, event: Event) -> None:
        """A round's event; how an answer ends is told at once, with all that waited before it."""
        now, tokens = self.loop.time(), len(event.piece.tokens)
        if self._came is not None:
            self._rounds.append((now - self._came, tokens))
        self._came = now
        if event.piece.error is not None or not tokens:  # whoever hears of it reads no further
            self.flush()
            self.deliver(event)
            return
        self._waiting = event if self._waiting is None else self._waiting + event
        if event.piece.finish:
            self.flush()
        else:
            self._plan()

    def flush(self) -> None:
        """Nothing waits any longer."""
        self._stop()
        if self._waiting is not None:
            self.deliver(self._waiting)
            self._waiting = None

    def _plan(self) -> None:
        """Send what is due, and come back when the next is."""
        self._stop()
        while self._waiting is not None:
            waiting = len(self._waiting.piece.tokens)
            seconds, tokens = departure(self._pace(), waiting)
            due, now = self._left + seconds, self.loop.time()
            if due > now:
                self._timer = self.loop.call_at(due, self._plan)
                return
            first, rest = self._waiting.split(tokens)
            self._waiting, self._left = rest if tokens < waiting else None, now
            self.deliver(first)

    def _pace(self) -> float:
        """Seconds of a round; 0 where rounds bring one token each."""
        if all(tokens == 1 for _, tokens in self._rounds):
            return 0.0
        return median(seconds for seconds, _ in self._rounds)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
