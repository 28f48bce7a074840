"""A stream ends its request wherever the connection ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from starlette.types import Message

from specdec.server.sse import EventStream


async def ended(stuck: str) -> list[str]:
    """What a stream tells of its end when the client reads no more, from a message of the type `stuck` on, and hangs
    up."""
    told: list[str] = []
    gone = asyncio.Event()

    async def events() -> AsyncGenerator[str, None]:
        try:
            yield "data: 1\n\n"
        finally:
            told.append("closed")

    async def receive() -> Message:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == stuck:
            gone.set()
            await asyncio.sleep(10)

    scope = {"type": "http", "asgi": {"spec_version": "2.3"}}  # uvicorn's
    await EventStream(events(), lambda: told.append("left"))(scope, receive, send)
    return told


@pytest.mark.parametrize(
    ("stuck", "told"), [("http.response.start", ["left"]), ("http.response.body", ["left", "closed"])]
)
def test_a_stream_that_nobody_began_to_read_is_left_too(stuck: str, told: list[str]) -> None:
    assert asyncio.run(ended(stuck)) == told
