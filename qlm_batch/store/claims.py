"""Leasing assigned slices, with the bodies of what is left to do in them."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.engine import Connection

from qlm_batch.domain.jobs import ClaimedRequest, ClaimedSlice
from qlm_batch.domain.transitions import SUSPECT_AFTER
from qlm_batch.store.sql import sql

_MOST_SLICES = 1024

_BOOT = sql(
    """
    SELECT 1 FROM instance
    WHERE name = :name AND boot_id = :boot_id AND retired_at IS NULL FOR SHARE
    """
)
_SUSPECT_LEASED = sql(
    """
    SELECT EXISTS (SELECT FROM slice
                   WHERE instance = :name AND state = 'leased' AND attempts >= :suspect)
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
    UPDATE slice
    SET state = 'leased', epoch = epoch + 1, lease_until = {now} + :lease_s,
        fruitful = false, preempt = false
    WHERE id IN (SELECT id FROM slice
                 WHERE id = ANY(CAST(:ids AS bigint[]))
                   AND state = 'assigned' AND instance = :name
                 ORDER BY id FOR UPDATE)
    RETURNING id
    """
)
_HEADS = sql(
    """
    SELECT s.id, s.epoch, s.run_id, s.generation, s.batch_id, s.deadline, s.expires_at,
           s.attempts, u.tenant, u.model, b.endpoint
    FROM slice s JOIN run u ON u.id = s.run_id JOIN batch b ON b.id = s.batch_id
    WHERE s.id = ANY(CAST(:ids AS bigint[]))
    ORDER BY s.assigned_at, s.place, s.id
    """
)
# A fresh slice has a whole range left to do, and is spared the look for rows.
_WORK = sql(
    """
    SELECT s.id, r.position, r.body, r.prompt_tokens,
           CASE WHEN s.generation = 1 THEN r.deadline END AS own_deadline
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
    if connection.scalar(_BOOT, {"name": instance, "boot_id": boot_id}) is None:
        return ()
    if holding and connection.scalar(_SUSPECT_LEASED, {"name": instance, "suspect": SUSPECT_AFTER}):
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
    leased = connection.scalars(_LEASE, {"ids": ids, "name": instance, "lease_s": lease_s}).all()
    return _work(connection, leased)


def _work(connection: Connection, ids: Sequence[int]) -> Sequence[ClaimedSlice]:
    requests: dict[int, list[tuple[int, str, float | None, int]]] = {i: [] for i in ids}
    for slice_id, position, body, prompt_tokens, deadline in connection.execute(
        _WORK, {"ids": list(ids)}
    ):
        requests[slice_id].append((position, body, deadline, prompt_tokens))
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
            requests=tuple(
                ClaimedRequest(head.run_id, *values) for values in sorted(requests[head.id])
            ),
        )
        for head in connection.execute(_HEADS, {"ids": list(ids)})
    ]
