"""What a client may ask of the server: sizes, counts and times; and the middleware that holds bodies to them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specdec.errors import SpecdecError
from specdec.server.errors import ApiError


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Limits of a server.

    Attributes:
        queue: sequences that may wait beyond those that run, those whose prompt is being read included; more are
            answered 429.
        request_seconds: from arrival (the body has been read) to the last token; then the request ends with 504.
        body_bytes, body_seconds: size of a body, and the time it may take to arrive (413, 408).
        header_seconds: time the head of a request may take; the connection is closed then.
        drain_seconds: time running requests get after SIGTERM.
        keep_alive_seconds: silence in a stream after which a comment line is sent.
    """

    queue: int = 256
    request_seconds: float = 600.0
    body_bytes: int = 8 * 1024 * 1024
    body_seconds: float = 30.0
    header_seconds: float = 15.0
    drain_seconds: float = 60.0
    keep_alive_seconds: float = 15.0

    def __post_init__(self) -> None:
        if self.queue < 0:
            raise SpecdecError("is out of range", field="queue", value=self.queue, allowed="0 or more")
        for name in (
            "request_seconds",
            "body_seconds",
            "header_seconds",
            "drain_seconds",
            "keep_alive_seconds",
        ):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise SpecdecError("is out of range", field=name, value=value, allowed="a positive number")


class BodyGuard:
    """ASGI middleware that reads bodies whole, within size and time, before anyone parses them.

    Args:
        app: what lies behind; it receives the body as one message.
        limits: see `ServerLimits`.
    """

    def __init__(self, app: ASGIApp, limits: ServerLimits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _two_lengths(scope):
            told = "Content-Length and Transfer-Encoding contradict each other; send one of them"
            await _refuse(ApiError(400, told, code="ambiguous_length"), scope, receive, send)
            return
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                body = await self._read(scope, receive)
        except ApiError as error:
            await _refuse(error, scope, receive, send)
            return
        except TimeoutError:
            late = f"the body did not arrive within {self.limits.body_seconds:g} seconds"
            await _refuse(ApiError(408, late, code="body_timeout"), scope, receive, send)
            return
        if body is not None:
            await self.app(scope, _replay(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None when the client left. Raises ApiError when it is too large."""
        most = self.limits.body_bytes
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > most:
                raise _too_large(most)
        parts, size = [], 0
        async for part in _parts(receive):
            if part is None:
                return None
            size += len(part)
            if size > most:
                raise _too_large(most)
            parts.append(part)
        return b"".join(parts)


async def _parts(receive: Receive) -> AsyncIterator[bytes | None]:
    """Pieces of a body; a last None when the client left."""
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            yield None
            return
        more = message.get("more_body", False)
        yield message.get("body", b"")


def _two_lengths(scope: Scope) -> bool:
    """Is the length given twice? A proxy may believe the other one: that is how second requests are smuggled."""
    return {b"content-length", b"transfer-encoding"} <= {name for name, _ in scope["headers"]}


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most} bytes", code="body_too_large")


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer and close: what is left of the body is not read."""
    answer = error.response()
    answer.headers["Connection"] = "close"
    with contextlib.suppress(OSError):
        await answer(scope, receive, send)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body as one message, then whatever the connection says (its end)."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again
