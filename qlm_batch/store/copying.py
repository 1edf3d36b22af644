"""Rows in the text format of PostgreSQL's COPY, and the sending of them."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy.engine import Connection

from qlm_batch.store.session import driver_cursor

NULL = "\\N"
_CHUNK_ROWS = 256


def escaped(value: str) -> str:
    """A text value for COPY; NUL, which PostgreSQL cannot hold, becomes U+FFFD."""
    if "\\" in value:
        value = value.replace("\\", "\\\\")
    if "\n" in value:
        value = value.replace("\n", "\\n")
    if "\t" in value:
        value = value.replace("\t", "\\t")
    if "\r" in value:
        value = value.replace("\r", "\\r")
    if "\0" in value:
        value = value.replace("\0", "\ufffd")
    return value


def field(value: str | float | None) -> str:
    """One value of any kind for COPY. Booleans are written as their numbers are read: t or f."""
    if value is None:
        return NULL
    if isinstance(value, str):
        return escaped(value)
    if isinstance(value, bool):
        return "t" if value else "f"
    return repr(value)


def copy_rows(connection: Connection, table: str, columns: str, rows: Iterable[str]) -> None:
    """Send preformatted rows, each ending with a newline, into `table`.

    An error raised by `rows` ends the COPY, and with it the transaction.
    """
    with (
        driver_cursor(connection) as cursor,
        cursor.copy(f"COPY {table} ({columns}) FROM STDIN") as copy,
    ):
        chunk: list[str] = []
        for row in rows:
            chunk.append(row)
            if len(chunk) == _CHUNK_ROWS:
                copy.write(_encoded(chunk))
                chunk.clear()
        if chunk:
            copy.write(_encoded(chunk))


def _encoded(chunk: list[str]) -> bytes:
    text = "".join(chunk)
    try:
        return text.encode()
    except UnicodeEncodeError:
        # Half of a surrogate pair, which JSON can spell and UTF-8 cannot.
        return text.encode(errors="replace")
