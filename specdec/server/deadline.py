"""The time a request has, from its arrival on: for reading its prompt as well as for its tokens."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from specdec.server.errors import ApiError


@dataclass(frozen=True, slots=True)
class Deadline:
    """So many seconds from now."""

    seconds: float
    _began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds; 0 when the time is over."""
        return max(self._began + self.seconds - time.monotonic(), 0.0)

    def missed(self) -> ApiError:
        """What the client is told then."""
        return ApiError(504, f"no answer within {self.seconds:g} seconds", code="request_timeout")
