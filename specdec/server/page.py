"""GET /: the chat page, one file, read once. It talks to this server alone, and its policy says so."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter, Response

POLICY = "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def routes() -> APIRouter:
    """The page."""
    router = APIRouter()
    page = files(__package__).joinpath("page.html").read_bytes()

    @router.get("/", include_in_schema=False)
    async def index() -> Response:
        """The chat page."""
        return Response(page, media_type="text/html; charset=utf-8", headers=HEADERS)

    return router
