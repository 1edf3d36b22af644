"""Leasing assigned slices, with the bodies of what is left to do in them."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from sqlalchemy.engine import Connection

from qlm_batch.domain.jobs import ClaimedRequest, ClaimedSlice
from qlm_batch.domain.transitions import SUSPECT_AFTER
from qlm_batch.store.sql import sql

_MOST_SLICES = 1024
_POSITION = attrgetter("position")

_BOOT = sql(
    """
    SELECT EXISTS (SELECT FROM slice s WHERE s.instance = i.name AND s.state = 'leased'
                                         AND s.attempts >= :suspect)
    FROM instance i
    WHERE i.name = :name AND i.boot_id = :boot_id AND i.retired_at IS NULL FOR SHARE OF i
    """
)
_ASSIGNED = sql(
    """
    SELECT id, remaining, attempts FROM slice
    WHERE instance = :name AND state = 'assigned'
    ORDER BY assigned_at, place, id LIMIT :most
    """
)
_LEASE = sql(
    """
    UPDATE slice s
    SET state = 'leased', epoch = s.epoch + 1, lease_until = {now} + :lease_s,
        fruitful = false, preempt = false
    FROM run u, batch b
    WHERE s.id IN (SELECT id FROM slice
                   WHERE id = ANY(CAST(:ids AS bigint[]))
                     AND state = 'assigned' AND instance = :name
                   ORDER BY id FOR UPDATE)
      AND u.id = s.run_id AND b.id = s.batch_id
    RETURNING s.id, s.epoch, s.run_id, s.generation, s.batch_id, s.deadline, s.expires_at,
              s.attempts, u.tenant, u.model, b.endpoint
    """
)
# A fresh slice has a whole range left to do, and is spared the look for rows.
_WORK = sql(
    """
    SELECT s.id, r.run_id, r.position, r.body,
           CASE WHEN s.generation = 1 THEN r.deadline END AS own_deadline, r.prompt_tokens
    FROM slice s
    JOIN request r ON r.run_id = s.run_id AND r.position >= s.lo AND r.position < s.hi
    WHERE s.id = ANY(CAST(:ids AS bigint[]))
      AND (s.remaining = s.hi - s.lo
           OR NOT EXISTS (SELECT FROM result x
                          WHERE x.run_id = r.run_id AND x.position = r.position
                            AND (x.generation = s.generation OR x.ok)))
    """
)


def claim_slices(
    connection: Connection,
    instance: str,
    boot_id: str,
    max_requests: int,
    lease_s: float,
    holding: int,
) -> Sequence[ClaimedSlice]:
    """Lease assigned slices in order; nothing for a boot that is not the current one.

    Claiming stops before a suspect slice unless nothing is held, so that the holder drains and the
    suspect is not passed over for ever.
    """
    if max_requests <= 0:
        return ()
    boot = {"name": instance, "boot_id": boot_id, "suspect": SUSPECT_AFTER}
    suspect_leased = connection.scalar(_BOOT, boot)
    if suspect_leased is None or (holding and suspect_leased):
        return ()
    rows = connection.execute(_ASSIGNED, {"name": instance, "most": _MOST_SLICES})
    ids: list[int] = []
    taken = 0
    for row in rows:
        if taken >= max_requests:
            break
        if row.attempts >= SUSPECT_AFTER:
            if not ids and not holding:
                ids.append(row.id)
            break
        ids.append(row.id)
        taken += row.remaining
    if not ids:
        return ()
    leased = connection.execute(_LEASE, {"ids": ids, "name": instance, "lease_s": lease_s})
    heads = {head.id: head for head in leased}
    return _work(connection, [heads[slice_id] for slice_id in ids if slice_id in heads])


def _work(connection: Connection, heads: Sequence[Any]) -> Sequence[ClaimedSlice]:
    requests: dict[int, list[ClaimedRequest]] = {head.id: [] for head in heads}
    for slice_id, *values in connection.execute(_WORK, {"ids": list(requests)}).all():
        requests[slice_id].append(ClaimedRequest(*values))
    return [
        ClaimedSlice(
            slice_id=head.id,
            epoch=head.epoch,
            run_id=head.run_id,
            generation=head.generation,
            batch_id=head.batch_id,
            tenant=head.tenant,
            model=head.model,
            endpoint=head.endpoint,
            deadline=head.deadline,
            expires_at=head.expires_at,
            suspect=head.attempts >= SUSPECT_AFTER,
            requests=tuple(sorted(requests[head.id], key=_POSITION)),
        )
        for head in heads
    ]
