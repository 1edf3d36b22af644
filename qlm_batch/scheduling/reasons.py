"""Where work stands, in the words that begin its reason."""

from __future__ import annotations


def after(ahead: int) -> str:
    """How the reason of what has so many groups ahead of it in its queue begins."""
    if not ahead:
        return "next on "
    return f"starts after {ahead} group{'s' if ahead != 1 else ''} on "


def of_batch(reason: str, place: int, first: int) -> str:
    """The reason of a group at `place` of a queue, as of a batch whose first stands at `first`.

    A batch's own groups are no work ahead of it. What is let go stands nowhere, whatever is first.
    """
    own = after(place)
    return after(first) + reason.removeprefix(own) if reason.startswith(own) else reason
