"""The messages between a holder of leases and the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Directive(StrEnum):
    """What a holder must do with a slice after a flush.

    `keep`: go on. `preempt`: release it, finished lines are safe. `lost`: another epoch holds it,
    stop at once. `closed`: it is done, cancelled or expired, stop at once.
    """

    KEEP = "keep"
    PREEMPT = "preempt"
    LOST = "lost"
    CLOSED = "closed"


class ReleaseReason(StrEnum):
    """Why a lease is given back; only `engine_died` counts as an attempt."""

    SHUTDOWN = "shutdown"
    PREEMPTED = "preempted"
    UNSUITABLE = "unsuitable"
    ENGINE_DIED = "engine_died"


@dataclass(frozen=True, slots=True)
class Held:
    """A lease as its holder knows it; `complete` says that every request has an outcome."""

    slice_id: int
    epoch: int
    complete: bool = False


@dataclass(frozen=True, slots=True)
class FlushOutcome:
    """What a flush did: rows `written` and `rejected` (duplicates and fenced ones), and orders."""

    written: int
    rejected: int
    directives: Mapping[int, Directive] = field(default_factory=dict)
    """By slice id, for every held slice and every slice a row named."""


@dataclass(frozen=True, slots=True)
class Reaped:
    """What one pass of the reaper did to slices."""

    requeued: int = 0
    bisected: int = 0
    failed_lines: int = 0
    expired: int = 0
    finished_batches: int = 0

    @property
    def any(self) -> bool:
        """Whether anything changed."""
        return bool(
            self.requeued
            or self.bisected
            or self.failed_lines
            or self.expired
            or self.finished_batches
        )
