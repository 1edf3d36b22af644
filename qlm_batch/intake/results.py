"""Writes one line's outcome as the contract's JSON, for result files and partial results alike."""

from __future__ import annotations

import hashlib

import orjson

from qlm_batch.domain.jobs import ExportLine, SliceState

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
_LINE_ENDS = tuple((mark.encode(), b"\\u%04x" % ord(mark)) for mark in ("\x85", "\u2028", "\u2029"))
"""What JSON lets stand in a text, and Python's `splitlines` and httpx's `iter_lines` cut at."""
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
    return line.ok, _escaped(b"".join(parts))


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


def _escaped(text: bytes) -> bytes:
    """The same JSON on one line for every reader. Such marks stand inside its strings only."""
    if not text.isascii():
        for mark, escape in _LINE_ENDS:
            text = text.replace(mark, escape)
    return text
