"""The time a request has, from its arrival on: for reading its prompt as well as for its tokens."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from specdec.server.errors import ApiError


@dataclass(frozen=True, slots=True)
class Deadline:
    """So many seconds from `arrived` on, now by the clock of `time.perf_counter`, as a request's own is."""

    seconds: float
    arrived: float = field(default_factory=time.perf_counter)

    @property
    def left(self) -> float:
        """Seconds; 0 when the time is over."""
        return max(self.arrived + self.seconds - time.perf_counter(), 0.0)

    def missed(self) -> ApiError:
        """What the client is told then."""
        return ApiError(504, f"no answer within {self.seconds:g} seconds", code="request_timeout")
