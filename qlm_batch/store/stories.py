"""What happened to one request of a batch."""

from __future__ import annotations

from sqlalchemy.engine import Connection

from qlm_batch.domain.jobs import ResultRow, SliceState, Usage
from qlm_batch.domain.stories import Loss, RequestStory, no_such_request, of_run
from qlm_batch.store.batches import decisions
from qlm_batch.store.sql import sql

_MOST_DECISIONS = 10_000

_REQUEST = sql(
    """
    SELECT r.run_id, r.position, r.line, u.model
    FROM run u JOIN request r ON r.run_id = u.id
    WHERE u.batch_id = :batch_id AND r.custom_id = :custom_id
    """
)
_SLICE = sql(
    """
    SELECT id, generation, state, instance, attempts, deadline, epoch FROM slice
    WHERE run_id = :run_id AND lo <= :position AND hi > :position
    ORDER BY generation DESC, id DESC LIMIT 1
    """
)
_RESULT = sql(
    """
    SELECT * FROM result WHERE run_id = :run_id AND position = :position
    ORDER BY ok DESC, generation DESC LIMIT 1
    """
)
_LOSSES = sql(
    """
    SELECT at, instance, reason FROM attempt_error
    WHERE run_id = :run_id AND lo <= :position AND hi > :position ORDER BY id
    """
)
_RUNS = sql("SELECT id FROM run WHERE batch_id = :batch_id")


def request_story(
    connection: Connection, tenant: str, batch_id: str, custom_id: str
) -> RequestStory:
    """See BatchStore."""
    told = tuple(decisions(connection, tenant, batch_id, _MOST_DECISIONS))
    given = {"batch_id": batch_id, "custom_id": custom_id}
    request = connection.execute(_REQUEST, given).first()
    if request is None:
        raise no_such_request(batch_id, custom_id)
    where = {"run_id": request.run_id, "position": request.position}
    part = connection.execute(_SLICE, where).one()
    row = connection.execute(_RESULT, where).one_or_none()
    outcome = None
    if row is not None:
        outcome = ResultRow(
            slice_id=part.id,
            epoch=row.epoch,
            run_id=row.run_id,
            position=row.position,
            generation=row.generation,
            request_id=row.request_id,
            status_code=row.status_code,
            error_code=row.error_code,
            error_message=row.error_message,
            usage=Usage(
                row.input_tokens, row.cached_tokens, row.output_tokens, row.reasoning_tokens
            ),
            started_at=row.started_at,
            first_token_s=row.first_token_s,
            duration_s=row.duration_s,
        )
    return RequestStory(
        batch_id=batch_id,
        custom_id=custom_id,
        line=request.line,
        model=request.model,
        deadline=part.deadline,
        generation=part.generation,
        state=SliceState(part.state),
        instance=part.instance or (row.instance if row is not None else None),
        attempts=part.attempts,
        decisions=of_run(told, request.run_id, set(connection.scalars(_RUNS, given))),
        losses=tuple(Loss(**loss._mapping) for loss in connection.execute(_LOSSES, where)),
        outcome=outcome,
    )
