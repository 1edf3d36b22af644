"""Text from outside, as PostgreSQL can hold it."""

from __future__ import annotations


def storable(text: str) -> str:
    """The text with U+FFFD for NUL, and a question mark for half of a surrogate pair.

    What a server said must not keep a row from being written, else it would be tried for ever.
    """
    return text.replace("\0", "\ufffd").encode(errors="replace").decode()
