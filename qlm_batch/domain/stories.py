"""What happened to one request of a batch."""

from __future__ import annotations

from dataclasses import dataclass

from qlm_batch.domain.errors import NotFound
from qlm_batch.domain.jobs import ResultRow, SliceState
from qlm_batch.domain.snapshot import Decision


@dataclass(frozen=True, slots=True)
class Loss:
    """A lease that ended without its holder's consent while the request was in it."""

    at: float
    instance: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class RequestStory:
    """A request's place, what was decided on its way, and what came of it.

    `state` is its slice's; `instance` the one that holds or held it, None while it is queued.
    `outcome` is its success, else its newest error, without a body; None while it has neither.
    """

    batch_id: str
    custom_id: str
    line: int
    model: str
    deadline: float
    generation: int
    state: SliceState
    instance: str | None
    attempts: int
    decisions: tuple[Decision, ...] = ()
    losses: tuple[Loss, ...] = ()
    outcome: ResultRow | None = None


def of_run(decisions: tuple[Decision, ...], run_id: int, runs: set[int]) -> tuple[Decision, ...]:
    """The decisions that concern one run of a batch: all but those on groups of its other runs."""
    others = {str(number) for number in runs if number != run_id}
    return tuple(
        made
        for made in decisions
        if made.group_key is None or made.group_key.partition(".")[0] not in others
    )


def no_such_request(batch_id: str, custom_id: str) -> NotFound:
    """For an id that no line of the batch has."""
    return NotFound(
        f"Batch '{batch_id}' has no line with the custom_id '{custom_id}'.",
        code="request_not_found",
        param="custom_id",
    )
