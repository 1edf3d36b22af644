"""The outermost layer: request ids, size bounds, timings, and the last word on errors."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qlm_batch.api.errors import internal_error
from qlm_batch.ids import REQUEST, new_id

MAX_BODY_BYTES = 1024**2
RATE_HEADERS = "rate_headers"
"""Key of the request's state under which the limiter leaves headers for the response."""
FRESH_ID = "fresh_id"
"""Key of the request's state under which an id made here lies; it is nobody else's."""

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_UPLOADS = frozenset({("POST", "/v1/files")})
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_CLIENT_GONE = 499

log = structlog.get_logger(__name__)

Observe = Callable[[str, str, int, float], None]
"""Told of each request: method, route template, status, seconds."""


class Edge:
    """Wraps the application.

    Every response carries `x-request-id`: the client's own when it is sane, else a new one, which
    an interactive request then goes by; and `openai-processing-ms`, the time until it began. Bodies
    other than uploads are bounded by what `most_bytes` says of their path, else by MAX_BODY_BYTES.
    What no handler knew becomes a 500 that says nothing about the inside, and is logged under the
    request id.
    """

    def __init__(
        self, app: ASGIApp, observe: Observe, most_bytes: Mapping[str, int] | None = None
    ) -> None:
        self._app = app
        self._observe = observe
        self._most_bytes = most_bytes or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI call."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        state = scope.setdefault("state", {})
        request_id = _offered(headers)
        if request_id is None:
            request_id = state[FRESH_ID] = new_id(REQUEST)
        status = 0
        begun = time.perf_counter()

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                out = MutableHeaders(scope=message)
                out["x-request-id"] = request_id
                out["openai-processing-ms"] = str(round((time.perf_counter() - begun) * 1000))
                for name, value in state.get(RATE_HEADERS, {}).items():
                    out[name] = value
            await send(message)

        if (scope["method"], scope["path"]) not in _UPLOADS:
            most = self._most_bytes.get(scope["path"], MAX_BODY_BYTES)
            receive = _bounded(receive, headers, most)
        try:
            with structlog.contextvars.bound_contextvars(request_id=request_id):
                try:
                    await self._app(scope, receive, tagged)
                except ClientDisconnect:
                    status = _CLIENT_GONE
                except Exception:
                    log.exception("request failed", method=scope["method"], path=scope["path"])
                    if status:
                        raise
                    await internal_error()(scope, receive, tagged)
        finally:
            seconds = time.perf_counter() - begun
            route = getattr(scope.get("route"), "path", "unknown")
            self._observe(scope["method"], route, status, seconds)
            say = log.debug if scope["method"] in _READING else log.info
            say(
                "request",
                request_id=request_id,
                method=scope["method"],
                path=scope["path"],
                status=status,
                seconds=round(seconds, 4),
            )


def _offered(headers: Headers) -> str | None:
    offered = headers.get("x-request-id")
    return offered if offered is not None and _SANE_ID.fullmatch(offered) else None


def _bounded(receive: Receive, headers: Headers, most: int) -> Receive:
    declared = headers.get("content-length", "0")
    taken = int(declared) if declared.isdecimal() and len(declared) < 20 else 0
    refusal = HTTPException(413, f"The request body is larger than {most} bytes.")
    if taken > most:

        async def refuse() -> Message:
            raise refusal

        return refuse
    taken = 0

    async def counted() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > most:
            raise refusal
        return message

    return counted
