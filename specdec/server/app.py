"""The application: routes behind the two guards, and the engine's thread started and ended with it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from specdec import __version__
from specdec.server import chat, completions, errors, models, page
from specdec.server.auth import KeyGuard
from specdec.server.limits import BodyGuard
from specdec.server.state import ServerState


def create_app(state: ServerState) -> FastAPI:
    """An ASGI application over a loaded decoder; its engine runs from start-up to shutdown."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        state.worker.start()
        try:
            yield
        finally:
            await state.close()

    # the usual documentation pages load scripts from elsewhere; the document itself is served
    app = FastAPI(title="specdec", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    errors.install(app)
    for router in (
        chat.routes(state),
        completions.routes(state),
        models.model_routes(state),
        models.token_routes(state),
        page.routes(),
    ):
        app.include_router(router)
    app.add_middleware(BodyGuard, limits=state.limits)
    app.add_middleware(KeyGuard, key=state.api_key)
    return app
