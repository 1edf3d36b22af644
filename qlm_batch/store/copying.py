"""Rows in the binary format of PostgreSQL's COPY, and the sending of them.

The server reads it at half the cost of the text format, and no text has to be escaped for it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from struct import Struct
from types import TracebackType
from typing import Any

from sqlalchemy.engine import Connection

from qlm_batch.store.session import driver_cursor

NULL = b"\xff\xff\xff\xff"

_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_TRAILER = b"\xff\xff"
CHUNK_BYTES = 1024**2
_CHUNK_ROWS = 256
_CHUNKS_AHEAD = 32

_LENGTH = Struct(">i").pack
_INT4 = Struct(">ii").pack
_INT8 = Struct(">iq").pack
_FLOAT8 = Struct(">id").pack


def text(value: str | None) -> bytes:
    """A field of type text; NUL, which PostgreSQL cannot hold, becomes U+FFFD."""
    if value is None:
        return NULL
    try:
        data = value.encode()
    except UnicodeEncodeError:
        # Half of a surrogate pair, which JSON can spell and UTF-8 cannot.
        data = value.encode(errors="replace")
    if b"\0" in data:
        data = data.replace(b"\0", "\ufffd".encode())
    return _LENGTH(len(data)) + data


def int4(value: int | None) -> bytes:
    """A field of type integer."""
    return NULL if value is None else _INT4(4, value)


def int8(value: int | None) -> bytes:
    """A field of type bigint."""
    return NULL if value is None else _INT8(8, value)


def float8(value: float | None) -> bytes:
    """A field of type double precision."""
    return NULL if value is None else _FLOAT8(8, value)


def copy_rows(
    connection: Connection, table: str, columns: str, rows: Iterable[bytes], *, ahead: bool = False
) -> None:
    """Send packed rows into `table`: each is its number of fields (16 bits) and its fields.

    An error raised by `rows` ends the COPY, and with it the transaction. With `ahead` a thread
    sends what was made while more is made: for rows that are costly to make, and many.
    """
    statement = f"COPY {table} ({columns}) FROM STDIN (FORMAT binary)"
    with driver_cursor(connection) as cursor, cursor.copy(statement) as copy:
        if ahead:
            with _Ahead(copy) as pipe:
                _send(pipe, rows)
        else:
            _send(copy, rows)


def _send(copy: Any, rows: Iterable[bytes]) -> None:
    for chunk in chunks_of(rows):
        copy.write(chunk)


def chunks_of(rows: Iterable[bytes]) -> Iterator[bytes]:
    """What is sent for the rows, in pieces of at most CHUNK_BYTES however large a row is.

    Holds one piece and one row at a time: so much may be sent ahead, whatever the rows are.
    """
    chunk = [_HEADER]
    size = 0
    for row in rows:
        chunk.append(row)
        size += len(row)
        if size >= CHUNK_BYTES or len(chunk) >= _CHUNK_ROWS:
            yield from _cut(b"".join(chunk))
            chunk.clear()
            size = 0
    chunk.append(_TRAILER)
    yield from _cut(b"".join(chunk))


def _cut(data: bytes) -> Iterator[bytes]:
    if len(data) <= CHUNK_BYTES:
        yield data
        return
    for start in range(0, len(data), CHUNK_BYTES):
        yield data[start : start + CHUNK_BYTES]


class _Ahead:
    """Passes chunks on in a thread of its own; `write` waits while too many are under way."""

    def __init__(self, copy: Any) -> None:
        self._copy = copy
        self._chunks: queue.Queue[bytes | None] = queue.Queue(_CHUNKS_AHEAD)
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="copy", daemon=True)

    def __enter__(self) -> _Ahead:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._chunks.put(None)
        self._thread.join()
        if error is None and self._fault is not None:
            raise self._fault

    def write(self, chunk: bytes) -> None:
        """Have a chunk sent; raises what went wrong with an earlier one."""
        if self._fault is not None:
            raise self._fault
        self._chunks.put(chunk)

    def _run(self) -> None:
        while (chunk := self._chunks.get()) is not None:
            if self._fault is None:
                try:
                    self._copy.write(chunk)
                except BaseException as fault:  # noqa: BLE001 - raised where the rows are made
                    self._fault = fault
