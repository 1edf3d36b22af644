"""Reads an upload's multipart body as it arrives: the file goes to a spool, never into memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import BinaryIO

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from qlm_batch.domain.errors import InvalidInput

FIELDS = frozenset({"purpose", "expires_after[anchor]", "expires_after[seconds]"})
_FIELD_BYTES = 1024


class MultipartUpload:
    """Takes the body in pieces, writes the part `file` to `spool` and hashes it on the way.

    Raises InvalidInput for what is not multipart, for unknown or repeated fields, and for a file
    larger than `max_bytes`. `boundary` comes from `boundary_of`.
    """

    def __init__(self, boundary: bytes, spool: BinaryIO, max_bytes: int) -> None:
        self._spool = spool
        self._max_bytes = max_bytes
        self._hash = hashlib.sha256()
        self._header: list[bytearray] = [bytearray(), bytearray()]
        self._disposition = b""
        self._name = ""
        self._texts: dict[str, bytearray] = {}
        self._ended = False
        self.size = 0
        self.filename: str | None = None
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._part_begins,
                    "on_header_field": self._header_name,
                    "on_header_value": self._header_value,
                    "on_header_end": self._header_ends,
                    "on_headers_finished": self._headers_end,
                    "on_part_data": self._data,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise _malformed() from error

    @property
    def sha256(self) -> str:
        """Hash of the file so far, in hex."""
        return self._hash.hexdigest()

    def feed(self, pieces: list[bytes]) -> None:
        """Take the next pieces of the body."""
        try:
            for piece in pieces:
                self._parser.write(piece)
        except FormParserError as error:
            raise _malformed() from error

    def finish(self) -> Mapping[str, str]:
        """The text fields, once the whole body was there; the file lies in the spool."""
        if not self._ended:
            raise InvalidInput("The upload ended before its last part.", code="incomplete_upload")
        if self.filename is None:
            raise InvalidInput(
                "Missing required parameter: 'file'.",
                code="missing_required_parameter",
                param="file",
            )
        return {name: text.decode(errors="replace") for name, text in self._texts.items()}

    def _part_begins(self) -> None:
        self._disposition = b""

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header[0] += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1] += data[start:end]

    def _header_ends(self) -> None:
        name, value = map(bytes, self._header)
        if name.lower() == b"content-disposition":
            self._disposition = value
        self._header = [bytearray(), bytearray()]

    def _headers_end(self) -> None:
        _, options = parse_options_header(self._disposition.decode("latin-1"))
        self._name = options.get(b"name", b"").decode(errors="replace")
        if self._name == "file":
            if self.filename is not None:
                raise InvalidInput(
                    "Send one 'file' per upload.", code="invalid_value", param="file"
                )
            self.filename = options.get(b"filename", b"").decode(errors="replace")
        elif self._name not in FIELDS:
            raise InvalidInput(
                f"Unknown parameter: '{self._name[:100]}'.",
                code="unknown_parameter",
                param=self._name[:100] or None,
            )
        elif self._name in self._texts:
            raise InvalidInput(
                f"'{self._name}' was sent twice.", code="invalid_value", param=self._name
            )
        else:
            self._texts[self._name] = bytearray()

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._name != "file":
            text = self._texts[self._name]
            if len(text) + end - start > _FIELD_BYTES:
                raise InvalidInput(
                    f"'{self._name}' is too long.", code="invalid_value", param=self._name
                )
            text += data[start:end]
            return
        self.size += end - start
        if self.size > self._max_bytes:
            raise too_large()
        view = memoryview(data)[start:end]
        self._hash.update(view)
        self._spool.write(view)

    def _end(self) -> None:
        self._ended = True


def boundary_of(content_type: str | None) -> bytes:
    """The boundary named by a request's content type; InvalidInput when it is not multipart."""
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise InvalidInput(
            "Upload the file as multipart/form-data, with the fields 'file' and 'purpose'.",
            code="invalid_body",
        )
    return boundary


def too_large() -> InvalidInput:
    """The contract's answer, word for word, to a file over the limit."""
    return InvalidInput("File is too large.", code="file_too_large", param="file")


def _malformed() -> InvalidInput:
    return InvalidInput("The body is not well-formed multipart/form-data.", code="invalid_body")
