"""Listening: uvicorn with a deadline on request heads, and a graceful end on SIGTERM.

uvicorn bounds the size of a head but not the time it takes; a client that sends a byte a minute would hold its
connection forever.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from specdec.errors import SpecdecError
from specdec.server.app import create_app
from specdec.server.limits import ServerLimits
from specdec.server.state import ServerState

LARGEST_HEAD = 32 * 1024  # bytes of request line and headers


def patient_protocol(seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol, with `seconds` for the head of each request."""

    class PatientProtocol(H11Protocol):
        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
            super().connection_made(transport)
            self._late = self.loop.call_later(seconds, self._give_up)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._relax()
            elif self._late is None:
                self._late = self.loop.call_later(seconds, self._give_up)

        def connection_lost(self, exc: Exception | None) -> None:
            self._relax()
            super().connection_lost(exc)

        def _relax(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def _give_up(self) -> None:
            self._late = None
            if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                self.transport.close()

    return PatientProtocol


class DrainingServer(uvicorn.Server):
    """Tells the state that no more requests are taken as soon as a signal arrives."""

    def __init__(self, config: uvicorn.Config, state: ServerState) -> None:
        super().__init__(config)
        self.state = state

    def handle_exit(self, sig: int, frame: Any) -> None:
        """The first signal drains, a second one ends at once.

        uvicorn's own would raise the signal again after a clean end, which is none then.
        """
        if not self.state.draining:
            logging.getLogger("uvicorn.error").addFilter(_is_news)
        self.force_exit = self.state.draining
        self.state.draining = self.should_exit = True


def _is_news(record: logging.LogRecord) -> bool:
    """Not that what was cut off at the end was cancelled: uvicorn would print a traceback for each answer."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, asyncio.CancelledError) and "CancelledError" not in record.getMessage()


def make_server(state: ServerState, host: str, port: int, *, log_level: str = "warning") -> DrainingServer:
    """A server that is ready to `run()`."""
    limits: ServerLimits = state.limits
    config = uvicorn.Config(
        create_app(state),
        host=host,
        port=port,
        log_level=log_level,
        access_log=False,
        http=patient_protocol(limits.header_seconds),
        ws="none",
        h11_max_incomplete_event_size=LARGEST_HEAD,
        timeout_graceful_shutdown=max(1, round(limits.drain_seconds)),
        server_header=False,
    )
    return DrainingServer(config, state)


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, taken before the model is loaded; it does not listen yet. Raises SpecdecError: not to be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise _taken(error, host, port) from None
    return listener


def listen(listener: socket.socket) -> str:
    """Let connections in; returns the URL. Raises SpecdecError: of two bound to one port, the other was first."""
    host, port = listener.getsockname()[:2]
    try:
        listener.listen()
    except OSError as error:
        raise _taken(error, host, port) from None
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _taken(error: Exception, host: str, port: int) -> SpecdecError:
    return SpecdecError(f"cannot listen: {error}", field="port", value=f"{host}:{port}",
                        remedy="Choose another with --port.")  # fmt: skip
