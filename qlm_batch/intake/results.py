"""Writes one line's outcome as the contract's JSON, for result files and partial results alike."""

from __future__ import annotations

import hashlib

import orjson

from qlm_batch.domain.jobs import ExportLine, SliceState
from qlm_batch.domain.json_text import one_line_for_all

_WITHOUT_ROW = {
    SliceState.EXPIRED: (
        "batch_expired",
        "This request could not be executed before the completion window expired.",
    ),
    SliceState.CANCELLED: (
        "batch_cancelled",
        "This request was not executed because the batch was cancelled.",
    ),
}
_LOST = ("server_error", "This request has no stored outcome; retry the batch's failed lines.")


def render_line(line: ExportLine) -> tuple[bool, bytes]:
    """Whether the line belongs in the output file (else the error file), and its text with LF.

    The stored body goes in unparsed; what any reader takes for a line end is escaped in it. The id
    depends only on the request, so that exporting again gives the same bytes.
    """
    parts = [
        b'{"id":"',
        _line_id(line).encode(),
        b'","custom_id":',
        orjson.dumps(line.custom_id),
        b',"response":',
    ]
    if line.status_code is not None and line.body is not None:
        parts += [
            b'{"status_code":',
            str(line.status_code).encode(),
            b',"request_id":',
            orjson.dumps(line.request_id),
            b',"body":',
            _one_line(line.body),
            b'},"error":null}\n',
        ]
    else:
        code, message = _error_of(line)
        parts += [b'null,"error":', orjson.dumps({"code": code, "message": message}), b"}\n"]
    return line.ok, one_line_for_all(b"".join(parts))


def _error_of(line: ExportLine) -> tuple[str, str]:
    if line.error_code is not None:
        return line.error_code, line.error_message or line.error_code
    return _WITHOUT_ROW.get(line.closed_as, _LOST)


def _line_id(line: ExportLine) -> str:
    name = f"{line.run_id}:{line.position}".encode()
    return "batch_req_" + hashlib.blake2b(name, digest_size=12).hexdigest()


def _one_line(body: str) -> bytes:
    """JSON text without line breaks, which can only be white space between its tokens."""
    if "\n" in body or "\r" in body:
        body = body.replace("\n", " ").replace("\r", " ")
    return body.encode()
