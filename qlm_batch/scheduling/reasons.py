"""Where work stands, in the words that begin its reason."""

from __future__ import annotations

LET_GO = "let go: "
"""How the reason of a batch begins whose last part will not be in time."""


def after(ahead: int) -> str:
    """How the reason of what has so many groups ahead of it in its queue begins."""
    if not ahead:
        return "next on "
    return f"starts after {ahead} group{'s' if ahead != 1 else ''} on "


def in_time(share: float, *, late: bool) -> str:
    """How the reason ends of what is in time only in part, or `late` whatever is done."""
    if late:
        return "; to be finished late"
    return f"; about {100.0 * share:.0f} % of it in time" if share < 1.0 else ""


def of_batch(reason: str, place: int, first: int) -> str:
    """The reason of a group at `place` of a queue, as of a batch of which it is the last part.

    The batch's first group in the queue stands at `first`: its own groups are no work ahead of it.
    What is let go stands nowhere, whatever is first.
    """
    if reason.startswith(LET_GO):
        return f"its last part is {reason}"
    own = after(place)
    if reason.startswith(own):
        reason = after(first) + reason.removeprefix(own)
    return reason.replace(" % of it in time", " % of its last part in time")
