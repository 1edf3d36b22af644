"""What one try to deliver an event came to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outcome:
    """`detail` says in a few words what happened; `gone` that trying again is pointless."""

    ok: bool
    detail: str
    status_code: int | None = None
    retry_after_s: float | None = None
    gone: bool = False
