"""The key: `Authorization: Bearer ...`, compared in constant time, asked for under /v1/ alone."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from specdec.server.errors import ApiError

GUARDED = "/v1/"


class KeyGuard:
    """ASGI middleware that refuses guarded paths without the key.

    Args:
        app: what lies behind.
        key: the key; None lets everyone in.
    """

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self.app, self.key = app, None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.key is not None and scope["type"] == "http" and scope["path"].startswith(GUARDED):
            given = _bearer(scope)
            if not hmac.compare_digest(given, self.key):
                message = "wrong API key" if given else "no API key; send it as 'Authorization: Bearer KEY'"
                await ApiError(401, message, code="invalid_api_key").response()(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _bearer(scope: Scope) -> bytes:
    """The token of the authorization header; empty when there is not exactly one."""
    found = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(found) != 1:
        return b""
    scheme, _, token = bytes(found[0]).partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else b""
