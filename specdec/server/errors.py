"""What goes wrong, as OpenAI clients want to hear it: one JSON object with message, type, param and code.

Knows nothing of routes. Messages are safe to print: no control over their bytes is left to whoever sent them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from specdec.errors import SpecdecError

log = logging.getLogger("specdec.server")

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
LONGEST = 400  # characters of a message: errors must not echo megabytes


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status.
        message: one sentence.
        param: the field that is wrong.
        code: a short machine-readable name.
        retry_after: seconds after which another try makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    @staticmethod
    def of(error: SpecdecError) -> ApiError:
        """A refusal of the library, told to the client."""
        return ApiError(400, str(error), param=error.field, code="invalid_value")

    def body(self) -> dict[str, Any]:
        """The object clients parse."""
        return {
            "error": {
                "message": _printable(self.message),
                "type": TYPES.get(self.status, "server_error" if self.status >= 500 else TYPES[400]),
                "param": None if self.param is None else _printable(self.param),
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def _printable(text: str) -> str:
    """Encodable and short, whatever came in."""
    text = text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
    return text.encode("utf-8", "replace").decode()


def install(app: FastAPI) -> None:
    """Answer every failure of `app` with the error object."""

    async def told(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error.response()

    async def refused(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, SpecdecError)
        return ApiError.of(error).response()

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return of_validation(error.errors(), request.headers.get("content-type", "")).response()

    async def http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if error.__cause__ is not None:  # all that FastAPI says then is "There was an error parsing the body"
            return _unreadable(error.__cause__).response()
        code = HTTPStatus(error.status_code).name.lower()
        answer = ApiError(error.status_code, str(error.detail), code=code).response()
        answer.headers.update(error.headers or {})
        return answer

    async def bug(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return ApiError(
            500, "the server made a mistake; its log tells more", code="internal_error"
        ).response()

    app.add_exception_handler(ApiError, told)
    app.add_exception_handler(SpecdecError, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, bug)


def _unreadable(cause: BaseException) -> ApiError:
    """A body that the JSON parser gave up on: no UTF-8, a number of thousands of digits, brackets without end."""
    told = "it is nested too deep" if isinstance(cause, RecursionError) else str(cause).partition(";")[0]
    return ApiError(400, f"the body is not JSON that can be read: {told}", code="invalid_json")


def of_validation(errors: Sequence[Any], kind: str = "application/json") -> ApiError:
    """The first complaint of the request parser as a 400 that names the field; `kind` is the body's Content-Type.

    A body of another kind is not read: pages of other sites may send text and forms here, but no JSON.

    >>> of_validation([{"type": "extra_forbidden", "loc": ("body", "tool"), "msg": "x"}]).message
    "tool: this server does not know the field 'tool'"
    """
    first: dict[str, Any] = max(errors, key=lambda e: len(e["loc"]))
    if first["type"] == "json_invalid":
        return ApiError(
            400, f"the body is not JSON: {first.get('ctx', {}).get('error', '')}", code="invalid_json"
        )
    place = [part for part in first["loc"][1:] if isinstance(part, int) or not _is_branch(part)]
    param = ".".join(map(str, place)) if place else None
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = f"this server does not know the field {str(place[-1])!r}"
        return ApiError(400, f"{param}: {message}", param=param, code="unknown_field")
    if param is None and first["type"] == "value_error":  # of several fields, one first
        return ApiError(400, message, param=message.split()[0], code="invalid_value")
    if param is None and "json" not in kind.lower():
        told = f"the body has Content-Type {kind or 'none'}; send it with Content-Type: application/json"
        return ApiError(400, told, code="invalid_body")
    if param is None:
        return ApiError(400, f"the body must be a JSON object ({message})", code="invalid_body")
    return ApiError(400, f"{param}: {message}", param=param, code="invalid_value")


def _is_branch(part: str) -> bool:
    """Does a part of a location name an alternative of a union, not a field?"""
    return "[" in part or part in ("str", "int", "float", "bool", "constrained-str", "function-after")
