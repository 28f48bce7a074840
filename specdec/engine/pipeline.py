"""Pipeline: rounds as recorded device programs, launched one ahead of what the host has read.

    device   | round t | round t + 1 | round t + 2 |
    host       launch t + 1, read t, hand out t | launch t + 2, read t + 1, ...

The host knows a round's tokens one launch late, so a request that has ended takes part in one round more, whose tokens
nobody hears of. Before anybody joins or leaves, everything in flight is read ("landed"). Knows requests by their slots
and lengths; what tokens mean is the engine's business.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from specdec.cache import KVCache
from specdec.drafting.eagle import EagleDrafter
from specdec.drafting.pairs import ROOM, Pairs
from specdec.drafting.protocol import Context, Drafter, Shape
from specdec.engine.graphs import BATCHES, Recording, Work, bucket
from specdec.engine.program import COUNTS, OFFERED, SICK, SIZES, TOKENS, Program, Seats, Standing, takes
from specdec.engine.request import Request
from specdec.engine.round import Emitted
from specdec.sampling import COLDEST
from specdec.target.protocol import Target
from specdec.tree import MAX_NODES


class Copy:
    """A tensor on its way to the host; reading it waits for it and for nothing that was launched later."""

    def __init__(self, source: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if source.is_cuda:
            self._host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            self._host.copy_(source, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        else:
            self._host = source.clone()

    def read(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._host


@dataclass(frozen=True, slots=True)
class Flight:
    """A round that was launched: for whom, of which shape, and what comes back."""

    requests: tuple[Request, ...]
    shape: Shape
    report: Copy
    promised: Copy


@dataclass(slots=True)
class _Seat:
    """What the host knows of a request on the device: its length and waiting pairs after the last landed round."""

    length: int
    waiting: int = 0


@dataclass(slots=True)
class Pipeline:
    """Launches rounds and lands them.

    Args:
        target: plain, not one that replays by itself.
        drafter: an EagleDrafter or a NoDrafter.
        cache: the engine's.
        depth: of the deepest tree.
        recording: makes programs.
    """

    target: Target
    drafter: Drafter
    cache: KVCache
    depth: int
    recording: Recording
    flights: deque[Flight] = field(default_factory=deque)
    _seats: dict[int, Seats] = field(default_factory=dict)
    _programs: dict[Hashable, Work] = field(default_factory=dict)
    _aboard: dict[int, _Seat] = field(default_factory=dict)
    _seated: tuple[Request, ...] = ()
    _landed: float = 0.0
    _program: Program = field(init=False)

    def __post_init__(self) -> None:
        info, slots = self.target.info, self.cache.slots
        standing = Standing.of(slots, self.cache.length, info.device)
        pairs = None
        if isinstance(self.drafter, EagleDrafter):
            config = self.drafter.head.config
            wide = config.target_hidden * len(config.taps)
            pairs = Pairs(self.drafter, slots, self.depth + 1, wide, info.dtype)
        self._program = Program(self.target, self.cache, standing, pairs)

    def fits(self, requests: Sequence[Request], shape: Shape) -> bool:
        """May this round be a device program?"""
        return (
            len(requests) <= BATCHES[-1]
            and shape.depth <= self.depth
            and not (shape.sampled or shape.prices or shape.node_floor or shape.level_floor)
            and all(takes(r.sampling) and r.constraint is None for r in requests)
        )

    def must_land(self, requests: Sequence[Request], shape: Shape) -> bool:
        """Does the host have to know more before this round can be launched?"""
        if not self.flights:
            return False
        ahead = sum(flight.shape.depth + 1 for flight in self.flights)
        longest = max((seat.length for seat in self._aboard.values()), default=0)
        return (
            tuple(requests) != self._seated
            or longest + ahead + max(shape.nodes, MAX_NODES) > self.cache.length
            or not self._can_read(shape)
        )

    def _can_read(self, shape: Shape) -> bool:
        """Are there few enough pairs for a round of this shape: to be read, or to be added to?"""
        pairs = self._program.pairs
        if pairs is None:
            return True
        most = max((seat.waiting for seat in self._aboard.values()), default=0)
        for flight in self.flights:
            most = flight.shape.depth + 1 + (most if flight.shape.nodes == 1 else 0)
        if shape.nodes == 1:
            return most < ROOM
        return most <= pairs.width and not any(pairs.drafter.pending(slot) for slot in self._aboard)

    def launch(self, requests: Sequence[Request], shape: Shape) -> None:
        """Start a round; `land` gives its tokens. Nothing may have to land first (see `must_land`)."""
        assert not self.must_land(requests, shape)
        seats = self._seat(requests)
        if not self._can_read(shape):
            self._read_all(requests, shape)
        greedy = all(r.sampling.greedy for r in requests)
        if not self.flights:
            self._landed = perf_counter()
        self._work(seats, shape, greedy)()
        self.flights.append(Flight(tuple(requests), shape, Copy(seats.report), Copy(seats.promised)))

    def land(self) -> tuple[Flight, Emitted]:
        """Wait for the oldest round and read it."""
        flight = self.flights.popleft()
        rows, promised = (
            flight.report.read().tolist(),
            float(flight.promised.read()[: len(flight.requests)].sum()),
        )
        rows = rows[: len(flight.requests)]
        now = perf_counter()
        spent, self._landed = now - self._landed, now
        for request, row in zip(flight.requests, rows, strict=True):
            if (seat := self._aboard.get(request.slot)) is not None and request.finish is None:
                seat.length += row[COUNTS]
                seat.waiting = row[COUNTS] + (seat.waiting if flight.shape.nodes == 1 else 0)
        return flight, Emitted(
            counts=[row[COUNTS] for row in rows],
            tokens=[row[TOKENS:] for row in rows],
            offered=[row[OFFERED] for row in rows],
            sizes=[row[SIZES] for row in rows],
            sick=[bool(row[SICK]) for row in rows],
            promised=promised,
            seconds={"verify": spent},  # one program: its phases cannot be told apart
        )

    def forget_finished(self) -> None:
        """Rounds in flight that nobody waits for any more are not worth landing."""
        while self.flights and all(r.finish is not None for r in self.flights[0].requests):
            self.flights.popleft()

    def leave(self, slot: int) -> None:
        """The request of this slot has ended: its device state is void, the rows its head has read stay known."""
        seat, self._seated = self._aboard.pop(slot, None), ()
        pairs = self._program.pairs
        if seat is None or pairs is None:
            return
        if not pairs.drafter.pending(slot):
            pairs.drafter.lanes[slot].rows = seat.length - seat.waiting

    def wipe(self, slot: int) -> None:
        """Zero what a failed request left with the head, which read it before anybody knew."""
        if self._program.pairs is not None:
            self._program.pairs.wipe(slot)

    def hand_back(self) -> None:
        """Return everyone to the drafter, for rounds that the host takes part in. Nothing may be in flight."""
        assert not self.flights
        if self._program.pairs is not None:
            for slot, seat in self._aboard.items():
                self._program.pairs.hand_back(slot, seat.length, seat.waiting)
        self._aboard.clear()
        self._seated = ()

    def _seat(self, requests: Sequence[Request]) -> Seats:
        """Put a batch in its places; who comes new brings along where it stands."""
        size = bucket(len(requests), BATCHES)
        if size not in self._seats:
            self._seats[size] = Seats.of(size, self.depth + 1, self.target.info.device)
        seats = self._seats[size]
        if tuple(requests) != self._seated:
            for request in requests:
                if request.slot not in self._aboard:
                    self._board(request)
            seats.take([request.slot for request in requests])
            self._seated = tuple(requests)
        return seats

    def _board(self, request: Request) -> None:
        s, slot, sampling = self._program.standing, request.slot, request.sampling
        s.lengths[slot] = request.length
        s.roots[slot] = request.root
        s.most[slot] = MAX_NODES if request.speculate else 1
        s.heat[slot] = max(sampling.temperature, COLDEST) if sampling.temperature else 0.0
        if request.uniforms is not None:
            start = len(request.prompt) - 1
            own = request.uniforms[: s.uniforms.shape[1] - start]
            s.uniforms[slot, start : start + len(own)] = own.to(s.uniforms.device)
        if self._program.pairs is not None:
            self._program.pairs.counts[slot] = 0
        self._aboard[slot] = _Seat(request.length)

    def _read_all(self, requests: Sequence[Request], shape: Shape) -> None:
        """More pairs wait than a round takes: leave them to the drafter, who reads them if the round will draft."""
        pairs, slots = self._program.pairs, [request.slot for request in requests]
        assert pairs is not None
        for slot in slots:
            seat = self._aboard[slot]
            pairs.hand_back(slot, seat.length, seat.waiting)
            seat.waiting = 0
        if shape.nodes > 1:
            where = torch.tensor(slots, device=self.target.info.device)
            pairs.drafter.extend(Context(where, where, where))

    def _work(self, seats: Seats, shape: Shape, greedy: bool) -> Work:
        """The program of this batch size and shape, recorded at first use."""
        key = (len(seats.slots), shape.depth, shape.width, shape.nodes, greedy)
        if key not in self._programs:
            before = [x[seats.slots].clone() for x in self._program.state()]

            def restore() -> None:
                """Recording runs the round several times: each is the first, or they would leave the slot."""
                for now, then in zip(self._program.state(), before, strict=True):
                    now[seats.slots] = then

            try:
                work = partial(self._program.run, seats, shape, greedy)
                self._programs[key] = self.recording.record(work, restore)
            finally:
                restore()
        return self._programs[key]
