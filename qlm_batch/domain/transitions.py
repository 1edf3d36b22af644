"""Which state may follow which, and what becomes of a slice whose lease was lost."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from qlm_batch.domain.jobs import BatchState, SliceState

BATCH: Mapping[BatchState, frozenset[BatchState]] = {
    BatchState.VALIDATING: frozenset(
        {BatchState.IN_PROGRESS, BatchState.FAILED, BatchState.CANCELLING}
    ),
    BatchState.IN_PROGRESS: frozenset({BatchState.FINALIZING, BatchState.CANCELLING}),
    BatchState.FINALIZING: frozenset({BatchState.COMPLETED, BatchState.EXPIRED}),
    BatchState.CANCELLING: frozenset({BatchState.CANCELLED}),
    # A retry of the failed lines reopens a finished batch with the next generation.
    BatchState.COMPLETED: frozenset({BatchState.IN_PROGRESS}),
    BatchState.EXPIRED: frozenset({BatchState.IN_PROGRESS}),
    BatchState.CANCELLED: frozenset({BatchState.IN_PROGRESS}),
    BatchState.FAILED: frozenset(),
}

TERMINAL = frozenset(
    {BatchState.COMPLETED, BatchState.FAILED, BatchState.EXPIRED, BatchState.CANCELLED}
)
CANCELLABLE = frozenset({BatchState.VALIDATING, BatchState.IN_PROGRESS})

SLICE: Mapping[SliceState, frozenset[SliceState]] = {
    SliceState.QUEUED: frozenset(
        {SliceState.ASSIGNED, SliceState.DONE, SliceState.EXPIRED, SliceState.CANCELLED}
    ),
    SliceState.ASSIGNED: frozenset(
        {
            SliceState.QUEUED,
            SliceState.LEASED,
            SliceState.DONE,
            SliceState.EXPIRED,
            SliceState.CANCELLED,
        }
    ),
    SliceState.LEASED: frozenset(
        {SliceState.QUEUED, SliceState.DONE, SliceState.EXPIRED, SliceState.CANCELLED}
    ),
    SliceState.DONE: frozenset(),
    SliceState.EXPIRED: frozenset(),
    SliceState.CANCELLED: frozenset(),
}

OPEN_SLICE = frozenset({SliceState.QUEUED, SliceState.ASSIGNED, SliceState.LEASED})

EVENT_OF: Mapping[BatchState, str] = {
    BatchState.COMPLETED: "batch.completed",
    BatchState.FAILED: "batch.failed",
    BatchState.EXPIRED: "batch.expired",
    BatchState.CANCELLED: "batch.cancelled",
}

SUSPECT_AFTER = 2
"""Consecutive fruitless leases after which a slice is held to have killed its engine."""


class AfterLoss(StrEnum):
    """What to do with a slice that lost its lease or its engine."""

    REQUEUE = "requeue"
    BISECT = "bisect"
    FAIL_LINE = "fail_line"


def after_lost_lease(attempts: int, remaining: int) -> AfterLoss:
    """What becomes of a slice after `attempts` consecutive leases that brought no new row.

    `remaining` is how many of its requests have no outcome. A slice is requeued until it is
    suspect; a suspect slice ran alone in its engine, so its loss is its own doing: it is halved
    until the poison request stands alone, and that one fails.
    """
    if attempts <= SUSPECT_AFTER:
        return AfterLoss.REQUEUE
    return AfterLoss.FAIL_LINE if remaining <= 1 else AfterLoss.BISECT
