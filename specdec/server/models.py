"""GET /v1/models, /health, /version, /metrics; POST /tokenize and /detokenize: what is small."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from specdec import __version__
from specdec.errors import RequestError
from specdec.server.schema import DetokenizeRequest, TokenizeRequest
from specdec.server.state import ServerState

EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"  # Prometheus' text format


def _model(state: ServerState) -> dict[str, Any]:
    info = state.decoder.engine.target.info
    return {
        "id": state.name,
        "object": "model",
        "created": state.created,
        "owned_by": "specdec",
        "root": info.name,
        "parent": None,
        "max_model_len": state.length,
    }


def model_routes(state: ServerState) -> APIRouter:
    """Models and the server's own condition."""
    router = APIRouter()

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model there is."""
        return {"object": "list", "data": [_model(state)]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """The model, by name."""
        state.check_model(name)
        return _model(state)

    @router.get("/health")
    @router.head("/health", include_in_schema=False)
    async def health() -> Response:
        """200 while requests are taken, 503 when the engine has died or the server is closing."""
        return Response(status_code=200 if state.healthy else 503)

    @router.get("/version")
    async def version() -> dict[str, str]:
        """The package's version."""
        return {"version": __version__}

    @router.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' exposition."""
        return Response(state.metrics.text(), media_type=EXPOSITION)

    return router


def token_routes(state: ServerState) -> APIRouter:
    """Text to tokens and back."""
    router = APIRouter()

    @router.post("/tokenize")
    async def tokenize(asked: TokenizeRequest, http: Request) -> dict[str, Any]:
        """Ids of a prompt or a conversation."""
        state.check_model(asked.model)
        with state.arriving(1) as deadline:
            ids = await state.read(http, deadline, _encode, state, asked)
        strings = [state.vocabulary.text(token) for token in ids] if asked.return_token_strs else None
        return {"count": len(ids), "max_model_len": state.length, "tokens": ids, "token_strs": strings}

    @router.post("/detokenize")
    async def detokenize(asked: DetokenizeRequest, http: Request) -> dict[str, Any]:
        """Text of ids, control tokens included."""
        state.check_model(asked.model)
        size = state.vocabulary.size
        if not all(0 <= token < size for token in asked.tokens):
            raise RequestError("holds ids outside the vocabulary", field="tokens", allowed=f"0 to {size - 1}")
        with state.arriving(1) as deadline:
            return {"prompt": await state.read(http, deadline, _decode, state, asked.tokens)}

    return router


def _encode(state: ServerState, asked: TokenizeRequest) -> tuple[int, ...]:
    if asked.messages:
        return state.reader.messages(asked.messages)
    return state.reader.text(asked.prompt or "", special=asked.add_special_tokens is not False)


def _decode(state: ServerState, tokens: list[int]) -> str:
    return str(state.decoder.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
