"""Racing an answer against the client's patience: whoever hangs up has their request cancelled."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import Request

from specdec.server.errors import ApiError

T = TypeVar("T")
CLIENT_CLOSED = 499  # nginx's status for answers that nobody hears


async def race(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`; as soon as the connection ends, `work` is cancelled.

    Raises:
        ApiError: 499, which nobody hears: the client hung up.
    """
    doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise ApiError(CLIENT_CLOSED, "the client hung up", code="client_closed")
    finally:
        for task in (doing, leaving):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
