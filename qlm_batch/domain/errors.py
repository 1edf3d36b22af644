"""One tree of errors; the API and the CLI each render it once, at their boundary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class QlmError(Exception):
    """Something went wrong that a caller can be told about.

    `message` names the problem and the remedy; `param` the offending field; `code` a stable word
    for programs; `line` the 1-based line of an input file; `retry_after_s` when to try again; `why`
    what lies under it, for whoever runs the service and for no caller.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str | None] = None

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        line: int | None = None,
        retry_after_s: float | None = None,
        why: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.param = param
        self.line = line
        self.retry_after_s = retry_after_s
        self.why = why

    @property
    def in_full(self) -> str:
        """The message and what lies under it, for logs."""
        return f"{self.message} ({self.why})" if self.why else self.message

    @property
    def permanent(self) -> bool:
        """Whether the same call would fail again, so that clients should not retry it."""
        return self.status < 500 and self.status not in (408, 429)

    def body(self) -> Mapping[str, str | None]:
        """The four keys of OpenAI's error object."""
        return {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }


class InvalidInput(QlmError):
    """The request or the file cannot be accepted as it is."""

    status = 400
    type = "invalid_request_error"


class Unauthenticated(QlmError):
    """No key, an unknown key or a revoked key."""

    status = 401
    type = "authentication_error"
    default_code = "invalid_api_key"


class Forbidden(QlmError):
    """The key is good but its role does not allow this."""

    status = 403
    type = "permission_error"


class NotFound(QlmError):
    """No such object for this tenant."""

    status = 404
    type = "invalid_request_error"


class Conflict(QlmError):
    """The object's state does not allow this."""

    status = 409
    type = "invalid_request_error"


class Unprocessable(QlmError):
    """Well formed, but contradicts what was sent before (an idempotency key used twice)."""

    status = 422
    type = "invalid_request_error"


class TooLarge(QlmError):
    """A bound on size was passed."""

    status = 413
    type = "invalid_request_error"


class TooMany(QlmError):
    """A limit on rate or queued work was passed; `retry_after_s` says when to try again."""

    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"


class Unavailable(QlmError):
    """A part this depends on is away; the caller may try again."""

    status = 503
    type = "server_error"
    default_code = "service_unavailable"


class NotLeader(QlmError):
    """A plan was written by a scheduler that no longer leads; it changed nothing."""


class EngineDead(QlmError):
    """The inference engine stopped and cannot answer any request it held."""


class ConfigurationError(QlmError):
    """The settings cannot work; the message says which and how to mend them."""
