"""Every error as OpenAI's envelope: one place, all four keys."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Mapping

import structlog
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Match

from qlm_batch.api.validation import validation_error
from qlm_batch.domain.errors import QlmError

log = structlog.get_logger(__name__)

RETRY_AFTER_S = 5.0
LOGGED_EVERY_S = 5.0
"""How often it is logged that something is away: every request would tell it."""
_SHOWN = 100


def install(app: FastAPI, admit: Callable[[Request], Awaitable[None]]) -> None:
    """Render each kind of error that routing, validation or an endpoint raises.

    `admit` raises for a caller who may not be told what is wrong with the request.
    """
    quiet_until = -math.inf

    @app.exception_handler(QlmError)
    async def told(request: Request, error: QlmError) -> JSONResponse:
        if error.status == 500:
            raise error
        nonlocal quiet_until
        if error.why and time.monotonic() >= quiet_until:
            quiet_until = time.monotonic() + LOGGED_EVERY_S
            log.warning("dependency_away", error=error.in_full)
        return render(error)

    @app.exception_handler(RequestValidationError)
    async def refused(request: Request, error: RequestValidationError) -> JSONResponse:
        try:
            await admit(request)
        except QlmError as stranger:
            return render(stranger)
        return render(validation_error(error.errors()))

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code not in (404, 405):
            try:
                await admit(request)
            except QlmError as stranger:
                return render(stranger)
        headers = {"x-should-retry": "false"} if error.status_code < 500 else {}
        if error.status_code == 405:
            headers["allow"] = ", ".join(sorted(_allowed(request)))
        return envelope(error.status_code, _http_body(request, error), headers)


def render(error: QlmError) -> JSONResponse:
    """The response for an error that may be told to the caller."""
    headers = {}
    retry_after = error.retry_after_s
    if retry_after is None and error.status == 503:
        retry_after = RETRY_AFTER_S
    if retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(retry_after)))
    if error.permanent:
        headers["x-should-retry"] = "false"
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return envelope(error.status, error.body(), headers)


def envelope(
    status: int, body: Mapping[str, str | None], headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """A response whose body is OpenAI's error envelope."""
    return JSONResponse({"error": dict(body)}, status_code=status, headers=dict(headers or {}))


def internal_error() -> JSONResponse:
    """The response for a fault of the service itself; it tells nothing about the inside."""
    return envelope(
        500,
        {
            "message": "The service failed to answer. Try again; "
            "if it goes on, give the x-request-id of this response to whoever runs it.",
            "type": "server_error",
            "param": None,
            "code": "internal_error",
        },
    )


def _http_body(request: Request, error: HTTPException) -> Mapping[str, str | None]:
    path = request.url.path[:_SHOWN]
    message, code = str(error.detail), None
    if error.status_code == 404:
        message = f"There is nothing at {request.method} {path}. The documentation is at /docs."
        code = "unknown_url"
    elif error.status_code == 405:
        allowed = " or ".join(sorted(_allowed(request)))
        message = f"{request.method} is not allowed at {path}; use {allowed}."
        code = "method_not_allowed"
    elif error.status_code == 400:
        message, code = "The request body could not be read as JSON.", "invalid_json"
    elif error.status_code == 413:
        code = "body_too_large"
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    return {"message": message, "type": kind, "param": None, "code": code}


def _allowed(request: Request) -> set[str]:
    """The methods of every route at this path; the router itself names only the first one's."""
    allowed: set[str] = set()
    for route in request.app.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            allowed |= route.methods or set()
    return allowed
