"""Server-sent events: how a stream of JSON objects looks on the wire, and how it ends."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from specdec.server.errors import ApiError, log

DONE = "data: [DONE]\n\n"
KEEP_ALIVE = ": keep-alive\n\n"  # a comment: clients skip it, proxies see that someone lives
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(data: Mapping[str, Any]) -> str:
    """One event.

    >>> event({"a": 1})
    'data: {"a":1}\\n\\n'
    """
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'), allow_nan=False)}\n\n"


class EventStream(StreamingResponse):
    """A streaming answer.

    Args:
        events: closed however the connection ends.
        leave: called then, too: a generator that nobody has begun to read has nothing to close.
    """

    def __init__(self, events: AsyncGenerator[str, None], leave: Callable[[], None]) -> None:
        self.events, self.leave = events, leave
        super().__init__(_with_end(events), media_type="text/event-stream", headers=HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.leave()
            await self.events.aclose()


async def _with_end(events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """The events; a failure on the way becomes an event of its own; `[DONE]` comes last in any case."""
    try:
        async for one in events:
            yield one
    except ApiError as error:
        yield event(error.body())
    except Exception:
        log.exception("a stream failed")
        yield event(
            ApiError(500, "the server made a mistake; its log tells more", code="internal_error").body()
        )
    yield DONE
