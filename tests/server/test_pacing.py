"""Even streams, on a clock of their own: nothing lost, nothing late at either end, and shorter waits in between."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import mean, quantiles
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from specdec.engine.logprobs import TokenLogprob
from specdec.engine.request import Finish, Piece
from specdec.server.events import Event
from specdec.server.pacing import LONGEST, Pacer

ROUND = 0.02


@dataclass
class Timer:
    call: Callable[[], None] | None

    def cancel(self) -> None:
        self.call = None


@dataclass
class Clock:
    """The part of an event loop that a pacer asks, with time that passes when told."""

    now: float = 100.0
    timers: list[tuple[float, int, Timer]] = field(default_factory=list)
    _number: itertools.count[int] = field(default_factory=itertools.count)

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, call: Callable[[], None]) -> Timer:
        timer = Timer(call)
        heapq.heappush(self.timers, (when, next(self._number), timer))
        return timer

    def run_until(self, then: float) -> None:
        while self.timers and self.timers[0][0] <= then:
            self.now, _, timer = heapq.heappop(self.timers)
            if timer.call is not None:
                timer.call()
        self.now = then


Rounds = Sequence[tuple[float, int]]


@dataclass
class Sent:
    """What a pacer made of rounds: arrivals of tokens, and the events that left, each with its time."""

    came: list[float] = field(default_factory=list)
    left: list[tuple[float, Event]] = field(default_factory=list)

    @property
    def delays(self) -> list[float]:
        """Seconds that each token waited."""
        times = [at for at, event in self.left for _ in event.piece.tokens]
        return [left - came for came, left in zip(self.came, times, strict=True)]


def _event(tokens: Iterable[int], finish: Finish | None = None) -> Event:
    ids = tuple(tokens)
    piece = Piece("r", ids, tuple(t % 2 == 0 for t in ids), tuple(f"<{t}>" for t in ids), finish)
    return Event(0, piece, tuple(TokenLogprob(t, -1.0) for t in ids))


def paced(rounds: Rounds) -> Sent:
    """Rounds (seconds since the one before, tokens) through a pacer; the last one ends the answer."""
    clock, sent, number = Clock(), Sent(), itertools.count()
    loop: Any = clock
    pacer = Pacer(lambda event: sent.left.append((clock.now, event)), loop)
    for at, (seconds, tokens) in enumerate(rounds):
        clock.run_until(clock.now + seconds)
        sent.came += [clock.now] * tokens
        pacer.push(_event(itertools.islice(number, tokens), "length" if at == len(rounds) - 1 else None))
    assert all(timer.call is None for _, _, timer in clock.timers)  # nobody is called after the end
    return sent


SECONDS = st.floats(0.0, 0.5)


@given(st.lists(st.tuples(SECONDS, st.integers(1, 9)), min_size=1, max_size=40))
def test_a_paced_stream_is_the_stream(rounds: Rounds) -> None:
    sent = paced(rounds)
    first, *later = [event for _, event in sent.left]
    whole = sum(later, start=first)
    assert whole == _event(range(len(sent.came)), "length")
    assert all(event.piece.finish is None for event in (first, *later)[:-1])
    assert all(len(event.logprobs) == len(event.piece.tokens) for event in (first, *later))
    assert min(sent.delays) >= 0
    assert sent.delays[0] == sent.delays[-1] == 0


def test_waits_between_tokens_are_shorter_and_delays_bounded() -> None:
    """Rounds of 20 ms whose drafts fail in half of all cases, as they come of summaries."""
    rounds = [
        (0.0, 1),
        *itertools.islice(itertools.cycle([(ROUND, n) for n in (1, 4, 1, 1, 2, 3, 1, 2)]), 200),
    ]
    sent = paced(rounds)
    gaps = [(b[0] - a[0], len(b[1].piece.tokens)) for a, b in itertools.pairwise(sent.left)]
    per_token = [seconds / tokens for seconds, tokens in gaps for _ in range(tokens)]
    assert quantiles(per_token, n=100)[98] < 0.85 * ROUND  # sent as they come, one in four waits a round
    assert max(seconds for seconds, _ in gaps[20:]) <= ROUND
    assert mean(sent.delays) < 3 * ROUND
    assert max(sent.delays) < 5 * ROUND


def test_nothing_waits_where_rounds_bring_one_token_each() -> None:
    sent = paced([(0.0, 1), *[(seconds, 1) for seconds in (0.02, 0.001, 0.05, 0.0, 0.02) * 8]])
    assert max(sent.delays) == 0


def test_a_late_round_finds_the_last_token_gone() -> None:
    sent = paced([(0.0, 1), *[(ROUND, 3)] * 20, (100 * ROUND, 1)])
    waited = [at for at, _ in sent.left]
    assert waited[-1] - waited[-2] > 90 * ROUND
    assert max(sent.delays) < 5 * ROUND


def test_slow_machines_do_not_hold_tokens_for_rounds() -> None:
    sent = paced([(0.0, 1), *[(10.0, 4)] * 20, (10.0, 1)])
    assert max(sent.delays) < 1.0


def test_what_waited_is_told_before_an_error() -> None:
    clock, left = Clock(), list[Event]()
    loop: Any = clock
    pacer = Pacer(left.append, loop)
    for tokens in ((0,), (1, 2, 3, 4), (5, 6, 7)):
        pacer.push(_event(tokens))
        clock.run_until(clock.now + LONGEST * ROUND)
    assert sum(len(event.piece.tokens) for event in left) < 8
    pacer.push(Event(0, Piece("r", (8,), (False,), ("<8>",), "error", "broke")))
    assert sum(left[1:-1], start=left[0]).piece.tokens == tuple(range(8))
    assert (left[-1].piece.tokens, left[-1].piece.error) == ((8,), "broke")
