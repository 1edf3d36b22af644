"""The queue and the fleet as of one moment, from sums over slices: never from requests."""

from __future__ import annotations

from typing import Any

from sqlalchemy.engine import Connection

from qlm_batch.domain.jobs import EngineKind, OnMiss, SloClass
from qlm_batch.domain.snapshot import RunView, Snapshot
from qlm_batch.store.instances import instances, lengths, most_tokens, to_prompts
from qlm_batch.store.planning import profiles, queues
from qlm_batch.store.sql import sql

_RUNS = sql(
    """
    SELECT q.*, u.batch_id, u.tenant, u.model, u.kind, u.slo_class, u.prompts, b.created_at,
           b.on_miss
    FROM (
        SELECT run_id, generation, min(deadline) AS deadline, count(*) AS slices,
               sum(remaining)::bigint AS requests, sum(prompt_tokens)::bigint AS prompt_tokens,
               sum(max_tokens)::bigint AS max_tokens, sum(unbounded)::bigint AS unbounded
        FROM slice WHERE state = 'queued' GROUP BY run_id, generation
    ) q
    JOIN run u ON u.id = q.run_id
    JOIN batch b ON b.id = u.batch_id
    ORDER BY q.run_id, q.generation
    """
)
_UNPROMISED = sql("SELECT id FROM batch WHERE state = 'in_progress' AND promise IS NULL")
_FINISHING = sql("SELECT id FROM batch WHERE state = 'finalizing'")
_NOW = sql("SELECT {now}")


def snapshot(connection: Connection, silent_s: float) -> Snapshot:
    """Everything a plan is made from; the connection must see one consistent moment."""
    now = connection.execute(_NOW).scalar_one()
    fleet = instances(connection, silent_s)
    limits = lengths([model for view in fleet for model in view.models])
    return Snapshot(
        now=now,
        runs=tuple(_to_view(row, limits) for row in connection.execute(_RUNS)),
        instances=tuple(fleet),
        queues=tuple(queues(connection)),
        profiles=tuple(profiles(connection)),
        unpromised=frozenset(connection.scalars(_UNPROMISED)),
        finishing=frozenset(connection.scalars(_FINISHING)),
    )


def _to_view(row: Any, limits: dict[str, int]) -> RunView:
    return RunView(
        run_id=row.run_id,
        generation=row.generation,
        batch_id=row.batch_id,
        tenant=row.tenant,
        model=row.model,
        kind=EngineKind(row.kind),
        slo_class=SloClass(row.slo_class),
        deadline=row.deadline,
        created_at=row.created_at,
        on_miss=OnMiss(row.on_miss),
        slices=row.slices,
        requests=row.requests,
        prompt_tokens=row.prompt_tokens,
        max_tokens=most_tokens(row, limits),
        prompts=to_prompts(row.prompts),
    )
