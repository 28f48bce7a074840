"""Recordings that work on the CPU: what CUDA graphs do, and what they do when they go wrong."""

from __future__ import annotations

from host_reads import HostReads

from specdec.engine.graphs import WARM_UP, Work, nothing


class Replaying:
    """Does the work again. Recording does it several times, as CUDA graphs do; the first replays are watched."""

    def __init__(self) -> None:
        self.recorded, self.replayed, self.reads = 0, 0, list[str]()

    def record(self, work: Work, restore: Work = nothing) -> Work:
        self.recorded += 1
        for _ in range(WARM_UP):
            work()
            restore()
        work()
        watched = iter(range(2))

        def again() -> None:
            self.replayed += 1
            if next(watched, None) is None:
                return work()
            with HostReads() as found:
                work()
            self.reads += found

        return again


class Broken:
    def record(self, work: Work, restore: Work = nothing) -> Work:
        raise RuntimeError("operation not permitted when stream is capturing")


class Forgetful:
    """Replays nothing: what the first run gave stays."""

    def record(self, work: Work, restore: Work = nothing) -> Work:
        work()
        return lambda: None
