"""Cuts a stream of bytes into lines without ever holding a line longer than allowed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import BinaryIO

_CHUNK_BYTES = 256 * 1024
_BOM = b"\xef\xbb\xbf"


def chunks_of(file: BinaryIO) -> Iterator[bytes]:
    """The file in pieces of a quarter of a megabyte."""
    while chunk := file.read(_CHUNK_BYTES):
        yield chunk


def split_lines(chunks: Iterable[bytes], max_line_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Each line that is not blank, with its 1-based number; None stands for one that is too long.

    A line ends with LF or CR LF; a byte-order mark before the first line is dropped. Holds at most
    one chunk and `max_line_bytes` at a time, and gives the same lines for any cut into chunks.
    """
    number = 1
    pending: list[bytes] = []
    pending_bytes = 0
    for chunk in chunks:
        lines = chunk.split(b"\n")
        rest = lines.pop()
        if lines and pending_bytes:
            pending.append(lines[0])
            lines[0] = b"".join(pending)
            pending.clear()
            pending_bytes = 0
        for line in lines:
            kept = _checked(line, number, max_line_bytes)
            if kept != b"":
                yield number, kept
            number += 1
        # Of a line past the limit enough is kept to know it: the limit, mark, CR and one byte more.
        room = max_line_bytes + len(_BOM) + 2 - pending_bytes
        if rest and room > 0:
            pending.append(rest[:room])
            pending_bytes += min(len(rest), room)
    if pending_bytes:
        kept = _checked(b"".join(pending), number, max_line_bytes)
        if kept != b"":
            yield number, kept


def _checked(line: bytes, number: int, max_line_bytes: int) -> bytes | None:
    """The line without mark and line end; empty when blank, None when too long."""
    if number == 1:
        line = line.removeprefix(_BOM)
    line = line.removesuffix(b"\r")
    if len(line) > max_line_bytes:
        return None
    return b"" if not line or line.isspace() else line
