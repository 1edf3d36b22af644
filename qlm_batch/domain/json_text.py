"""JSON text that is passed on unparsed."""

from __future__ import annotations

_LINE_ENDS = tuple((mark.encode(), b"\\u%04x" % ord(mark)) for mark in ("\x85", "\u2028", "\u2029"))
"""What JSON lets stand in a text, and Python's `splitlines` and httpx's `iter_lines` cut at."""


def one_line_for_all(text: bytes) -> bytes:
    """The same JSON, one line also for readers that know more line ends than LF and CR.

    Such marks stand inside its strings only, where they are escaped.
    """
    if not text.isascii():
        for mark, escape in _LINE_ENDS:
            text = text.replace(mark, escape)
    return text
