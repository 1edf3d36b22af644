"""Result rows from what became of a request."""

from __future__ import annotations

from qlm_batch.domain.engine import EngineAnswer
from qlm_batch.domain.jobs import ClaimedRequest, ClaimedSlice, ResultRow
from qlm_batch.ids import new_id

REQUEST = "req_"
EXPIRED_MESSAGE = "This request could not be executed before the completion window expired."


def answered(
    claimed: ClaimedSlice,
    request: ClaimedRequest,
    request_id: str,
    answer: EngineAnswer,
    started_at: float,
    duration_s: float,
) -> ResultRow:
    """The engine answered, with whatever status; `duration_s` is used where it told none."""
    return ResultRow(
        slice_id=claimed.slice_id,
        epoch=claimed.epoch,
        run_id=request.run_id,
        position=request.position,
        generation=claimed.generation,
        request_id=request_id,
        status_code=answer.status_code,
        body=answer.body,
        usage=answer.usage,
        started_at=started_at,
        first_token_s=answer.first_token_s,
        duration_s=duration_s if answer.duration_s is None else answer.duration_s,
    )


def failed(
    claimed: ClaimedSlice,
    request: ClaimedRequest,
    code: str,
    message: str,
    *,
    request_id: str | None = None,
    started_at: float | None = None,
) -> ResultRow:
    """There is no answer, and the line's error says why."""
    return ResultRow(
        slice_id=claimed.slice_id,
        epoch=claimed.epoch,
        run_id=request.run_id,
        position=request.position,
        generation=claimed.generation,
        request_id=request_id or new_id(REQUEST),
        error_code=code,
        error_message=message,
        started_at=started_at,
    )


def expired(claimed: ClaimedSlice, request: ClaimedRequest) -> ResultRow:
    """The line's deadline passed."""
    return failed(claimed, request, "batch_expired", EXPIRED_MESSAGE)
