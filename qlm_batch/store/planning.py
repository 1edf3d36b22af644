"""What the leader writes: plans, assignments, profiles. Every write checks its epoch first."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.engine import Connection

from qlm_batch.domain.snapshot import (
    Assignment,
    Decision,
    Observation,
    Output,
    Plan,
    Profile,
    QueueEntry,
)
from qlm_batch.store.fleet_tables import decision, virtual_queue
from qlm_batch.store.leadership import fence
from qlm_batch.store.loss import requeue
from qlm_batch.store.sql import sql

_ESTIMATES = sql(
    """
    INSERT INTO estimate AS e (batch_id, p50, p95, miss, reason, made_at)
    SELECT b.id, d.p50, d.p95, d.miss, d.reason, d.made_at
    FROM unnest(CAST(:ids AS text[]), CAST(:p50 AS float8[]), CAST(:p95 AS float8[]),
                CAST(:miss AS float8[]), CAST(:reason AS text[]), CAST(:made_at AS float8[]))
         AS d(id, p50, p95, miss, reason, made_at)
    JOIN batch b ON b.id = d.id AND b.state IN ('in_progress', 'finalizing')
    ORDER BY b.id
    ON CONFLICT (batch_id) DO UPDATE
    SET p50 = excluded.p50, p95 = excluded.p95, miss = excluded.miss,
        reason = excluded.reason, made_at = excluded.made_at
    """
)
_PROMISES = sql(
    """
    UPDATE batch b
    SET promise = jsonb_build_object('p50', e.p50, 'p95', e.p95, 'reason', e.reason,
                                     'estimator', CAST(:estimator AS text), 'made_at', e.made_at)
    FROM estimate e
    WHERE b.id IN (SELECT id FROM batch
                   WHERE id = ANY(CAST(:ids AS text[])) AND promise IS NULL
                     AND state = 'in_progress'
                   ORDER BY id FOR NO KEY UPDATE)
      AND e.batch_id = b.id AND e.p50 IS NOT NULL
    """
)


def save_plan(
    connection: Connection, epoch: int, plan: Plan, decisions: Sequence[Decision]
) -> None:
    """Write what changed of the virtual queues, the estimates, first promises and decisions."""
    fence(connection, epoch)
    _save_queues(connection, plan)
    if plan.estimates:
        made = plan.estimates
        connection.execute(
            _ESTIMATES,
            {
                "ids": list(made),
                "p50": [estimate.p50 for estimate in made.values()],
                "p95": [estimate.p95 for estimate in made.values()],
                "miss": [estimate.miss_probability for estimate in made.values()],
                "reason": [estimate.reason for estimate in made.values()],
                "made_at": [estimate.made_at for estimate in made.values()],
            },
        )
        connection.execute(_PROMISES, {"ids": list(made), "estimator": plan.estimator})
    if decisions:
        connection.execute(sa.insert(decision), [_decision_row(made) for made in decisions])


def _decision_row(made: Decision) -> dict[str, object]:
    return {
        "kind": made.kind,
        "at": made.at,
        "batch_id": made.batch_id,
        "group_key": made.group_key,
        "instance": made.instance,
        "detail": dict(made.detail),
    }


def _save_queues(connection: Connection, plan: Plan) -> None:
    wanted = {
        (queue.instance, position): QueueEntry(
            queue.instance, position, planned.group.key, planned.group.slices, planned.reason
        )
        for queue in plan.queues
        for position, planned in enumerate(queue.groups)
    }
    saved = {(entry.instance, entry.position): entry for entry in queues(connection)}
    gone = [place for place in saved if place not in wanted]
    if gone:
        keys = sa.tuple_(virtual_queue.c.instance, virtual_queue.c.position)
        connection.execute(sa.delete(virtual_queue).where(keys.in_(gone)))
    changed = [asdict(entry) for place, entry in wanted.items() if saved.get(place) != entry]
    if changed:
        upsert = insert(virtual_queue)
        connection.execute(
            upsert.on_conflict_do_update(
                index_elements=["instance", "position"],
                set_={name: upsert.excluded[name] for name in ("group_key", "slices", "reason")},
            ),
            changed,
        )


def queues(connection: Connection) -> Sequence[QueueEntry]:
    """The saved virtual queues, by instance and position."""
    rows = connection.execute(
        sa.select(virtual_queue).order_by(virtual_queue.c.instance, virtual_queue.c.position)
    )
    return [QueueEntry(**row._mapping) for row in rows]


_KEEP = sql(
    """
    UPDATE estimate e SET forecast = CAST(d.data AS jsonb)
    FROM unnest(CAST(:ids AS text[]), CAST(:data AS text[])) AS d(id, data)
    WHERE e.batch_id = d.id
    """
)
_FORECASTS = sql(
    """
    SELECT b.id, e.forecast FROM batch b JOIN estimate e ON e.batch_id = b.id
    WHERE b.state IN ('in_progress', 'finalizing') AND e.forecast IS NOT NULL
    """
)


def keep_forecasts(
    connection: Connection, epoch: int, kept: Mapping[str, Mapping[str, object]]
) -> None:
    """Keep what was foreseen, beside the estimates."""
    fence(connection, epoch)
    data = [json.dumps(dict(own)) for own in kept.values()]
    connection.execute(_KEEP, {"ids": list(kept), "data": data})


def forecasts(connection: Connection) -> Mapping[str, Mapping[str, object]]:
    """What was kept of batches that have not ended."""
    return {row.id: row.forecast for row in connection.execute(_FORECASTS)}


_LIVE = sql(
    """
    SELECT name FROM instance
    WHERE name = ANY(CAST(:names AS text[])) AND boot_id <> ALL(past_boots)
    ORDER BY name FOR SHARE
    """
)
_QUEUED = sql(
    """
    SELECT id FROM slice
    WHERE run_id = :run_id AND generation = :generation AND state = 'queued'
    ORDER BY attempts, id LIMIT :slices FOR UPDATE SKIP LOCKED
    """
)
_ASSIGN = sql(
    """
    UPDATE slice s
    SET state = 'assigned', instance = d.instance, group_key = d.group_key,
        assigned_at = {now}, place = d.place
    FROM unnest(CAST(:ids AS bigint[]), CAST(:instances AS text[]), CAST(:groups AS text[]))
         WITH ORDINALITY AS d(id, instance, group_key, place)
    WHERE s.id = d.id AND s.state = 'queued'
    """
)


def assign(
    connection: Connection, epoch: int, assignments: Sequence[Assignment]
) -> Mapping[str, int]:
    """Place queued slices, suspects last within their run; slices per instance that got some.

    Instances that retired or died meanwhile get nothing.
    """
    fence(connection, epoch)
    names = sorted({wanted.instance for wanted in assignments})
    live = set(connection.scalars(_LIVE, {"names": names})) if names else set()
    placed = [wanted for wanted in assignments if wanted.instance in live and wanted.slices > 0]
    needed: Counter[tuple[int, int]] = Counter()
    for wanted in placed:
        needed[wanted.run_id, wanted.generation] += wanted.slices
    free = {
        (run_id, generation): deque(
            connection.scalars(
                _QUEUED, {"run_id": run_id, "generation": generation, "slices": slices}
            )
        )
        for (run_id, generation), slices in sorted(needed.items())
    }
    ids: list[int] = []
    instances: list[str] = []
    groups: list[str] = []
    for wanted in placed:
        queued = free[wanted.run_id, wanted.generation]
        for _ in range(min(wanted.slices, len(queued))):
            ids.append(queued.popleft())
            instances.append(wanted.instance)
            groups.append(wanted.group_key)
    if ids:
        connection.execute(_ASSIGN, {"ids": ids, "instances": instances, "groups": groups})
    return Counter(instances)


_UNCLAIMED = sql(
    "SELECT id FROM slice WHERE instance = :name AND state = 'assigned' ORDER BY id FOR UPDATE"
)


def unassign(connection: Connection, epoch: int, instance: str) -> int:
    """Queue again what an instance has not claimed."""
    fence(connection, epoch)
    ids = connection.scalars(_UNCLAIMED, {"name": instance}).all()
    requeue(connection, ids)
    return len(ids)


_VICTIMS = sql(
    """
    SELECT id, state FROM slice
    WHERE id IN (SELECT id FROM slice
                 WHERE instance = :name
                   AND (state = 'assigned' OR (state = 'leased' AND NOT preempt))
                 ORDER BY deadline DESC, state = 'leased', place DESC, id DESC
                 LIMIT :slices)
      AND instance = :name AND (state = 'assigned' OR (state = 'leased' AND NOT preempt))
    ORDER BY id FOR UPDATE
    """
)
_MARK = sql("UPDATE slice SET preempt = true WHERE id = ANY(CAST(:ids AS bigint[]))")


def preempt(connection: Connection, epoch: int, instance: str, slices: int) -> int:
    """Mark leased slices to be given back and queue unclaimed ones, latest deadline first."""
    fence(connection, epoch)
    rows = connection.execute(_VICTIMS, {"name": instance, "slices": max(0, slices)}).all()
    requeue(connection, [row.id for row in rows if row.state == "assigned"])
    connection.execute(_MARK, {"ids": [row.id for row in rows if row.state == "leased"]})
    return len(rows)


_TAKE = sql(
    """
    WITH taken AS (
        DELETE FROM observation WHERE id IN (
            SELECT id FROM observation ORDER BY id LIMIT :limit FOR UPDATE SKIP LOCKED
        ) RETURNING id, data
    )
    SELECT data FROM taken ORDER BY id
    """
)


def take_observations(connection: Connection, epoch: int, limit: int) -> Sequence[Observation]:
    """Remove and return reports, oldest first."""
    fence(connection, epoch)
    return [_to_observation(data) for data in connection.scalars(_TAKE, {"limit": limit})]


def _to_observation(data: dict[str, Any]) -> Observation:
    return Observation(
        **{
            **data,
            # A worker of the release before does not tell whether an answer was cut.
            "outputs": tuple(
                Output(str(t), int(out), int(prompt), *map(bool, cut))
                for t, out, prompt, *cut in data["outputs"]
            ),
            "steps": tuple((int(a), int(b), int(c), float(d)) for a, b, c, d in data["steps"]),
            # A worker of the release before tells of none.
            "calls": tuple(
                (float(at), float(due_s), str(t), int(out), int(prompt))
                for at, due_s, t, out, prompt in data.get("calls", ())
            ),
        }
    )


_REPORT = sql("INSERT INTO observation (data) VALUES (CAST(:data AS jsonb))")


def add_observations(connection: Connection, observations: Iterable[Observation]) -> None:
    """Keep reports until the leader takes them."""
    rows = [{"data": json.dumps(asdict(seen))} for seen in observations]
    if rows:
        connection.execute(_REPORT, rows)


_PROFILE = sql(
    """
    INSERT INTO profile (model, device, data, updated_at)
    VALUES (:model, :device, CAST(:data AS jsonb), {now})
    ON CONFLICT (model, device) DO UPDATE
    SET data = excluded.data, updated_at = excluded.updated_at
    """
)


def save_profiles(connection: Connection, epoch: int, profiles: Sequence[Profile]) -> None:
    """Remember what was learned, in place of what was known before."""
    fence(connection, epoch)
    rows = [
        {"model": known.model, "device": known.device, "data": json.dumps(dict(known.data))}
        for known in profiles
    ]
    if rows:
        connection.execute(_PROFILE, rows)


_PROFILES = sql("SELECT model, device, data FROM profile ORDER BY model, device")


def profiles(connection: Connection) -> Sequence[Profile]:
    """All that was learned."""
    return [Profile(**row._mapping) for row in connection.execute(_PROFILES)]
