"""Storing rows of results and closing what they complete, under the locks of their slices."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from struct import Struct

from sqlalchemy.engine import Connection

from qlm_batch.domain.jobs import ResultRow
from qlm_batch.store.closing import settle
from qlm_batch.store.copying import copy_rows, float8, int4, text
from qlm_batch.store.sql import sql

EXPIRED_LINE = "batch_expired"

_LOCK = sql(
    """
    SELECT s.id, s.run_id, s.batch_id, s.generation, s.lo, s.hi, s.state, s.epoch, s.instance,
           s.attempts, s.fruitful, s.preempt, s.lease_until, s.remaining,
           s.completed + s.failed AS stored,
           {now} AS now
    FROM slice s WHERE s.id = ANY(CAST(:ids AS bigint[]))
    ORDER BY s.id FOR NO KEY UPDATE
    """
)
_STORED = sql(
    """
    SELECT x.run_id, x.position, s.generation
    FROM slice s
    JOIN result x ON x.run_id = s.run_id AND x.position >= s.lo AND x.position < s.hi
                 AND (x.generation = s.generation OR x.ok)
    WHERE s.id = ANY(CAST(:ids AS bigint[]))
    """
)
_COLUMNS = (
    "run_id, position, generation, ok, request_id, status_code, body, error_code, error_message,"
    " input_tokens, cached_tokens, output_tokens, reasoning_tokens, instance, epoch, started_at,"
    " first_token_s, duration_s, stored_at"
)
_COUNT = sql(
    """
    UPDATE slice s
    SET prompt_tokens = s.prompt_tokens * (s.remaining - d.rows) / s.remaining,
        max_tokens = s.max_tokens * (s.remaining - d.rows) / s.remaining,
        unbounded = s.unbounded * (s.remaining - d.rows) / s.remaining,
        remaining = s.remaining - d.rows,
        completed = s.completed + d.completed,
        failed = s.failed + d.rows - d.completed,
        input_tokens = s.input_tokens + d.input_tokens,
        cached_tokens = s.cached_tokens + d.cached_tokens,
        output_tokens = s.output_tokens + d.output_tokens,
        reasoning_tokens = s.reasoning_tokens + d.reasoning_tokens,
        fruitful = s.fruitful OR d.fruitful,
        missed = s.missed OR (d.missed AND b.deadline <= {now}),
        state = CASE WHEN s.remaining = d.rows THEN 'done' ELSE s.state END,
        lease_until = CASE WHEN s.remaining = d.rows THEN NULL ELSE s.lease_until END
    FROM unnest(
        CAST(:ids AS bigint[]), CAST(:rows AS bigint[]), CAST(:completed AS bigint[]),
        CAST(:input_tokens AS bigint[]), CAST(:cached_tokens AS bigint[]),
        CAST(:output_tokens AS bigint[]), CAST(:reasoning_tokens AS bigint[]),
        CAST(:fruitful AS boolean[]), CAST(:missed AS boolean[])
    ) AS d(id, rows, completed, input_tokens, cached_tokens, output_tokens, reasoning_tokens,
           fruitful, missed), batch b
    WHERE s.id = d.id AND b.id = s.batch_id
    RETURNING s.id, s.remaining
    """
)


@dataclass(slots=True)
class LockedSlice:
    """A slice as it is; `stored` counts the rows of its generation, `now` is the time of the look.

    Each row of a flush asks several of these fields, which a row of the driver gives slowly.
    """

    id: int
    run_id: int
    batch_id: str
    generation: int
    lo: int
    hi: int
    state: str
    epoch: int
    instance: str | None
    attempts: int
    fruitful: bool
    preempt: bool
    lease_until: float | None
    remaining: int
    stored: int
    now: float

    @property
    def open(self) -> bool:
        """Whether it takes results."""
        return self.state in ("queued", "assigned", "leased")

    @property
    def untouched(self) -> bool:
        """Whether no line has a row of any generation that counts."""
        return not self.stored and self.remaining == self.hi - self.lo


@dataclass(slots=True)
class _Sum:
    rows: int = 0
    completed: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    fruitful: bool = False
    missed: bool = False

    def add(self, row: ResultRow, *, current: bool) -> None:
        """Count a row; `current` when it comes from the lease that holds now."""
        usage = row.usage
        self.rows += 1
        self.completed += row.ok
        self.input_tokens += usage.input_tokens
        self.cached_tokens += usage.cached_tokens
        self.output_tokens += usage.output_tokens
        self.reasoning_tokens += usage.reasoning_tokens
        self.fruitful |= current
        self.missed |= row.error_code == EXPIRED_LINE


@dataclass(frozen=True, slots=True)
class Stored:
    """How many rows were new, which slices they closed, and how many batches that settled."""

    written: int
    closed: Collection[int]
    settled: int


def lock_slices(connection: Connection, ids: Collection[int]) -> dict[int, LockedSlice]:
    """The slices as they are, locked in the order of their ids until the transaction ends."""
    rows = connection.execute(_LOCK, {"ids": sorted(ids)}).all()
    return {row.id: LockedSlice(*row) for row in rows}


def store_rows(
    connection: Connection,
    slices: Mapping[int, LockedSlice],
    rows: Sequence[ResultRow],
    instance: str | None,
) -> Stored:
    """Store rows of locked, open slices; a line that has its row already keeps it.

    The locks leave one writer per slice, so looking first and copying after cannot collide.
    """
    if not rows:
        return Stored(0, (), 0)
    # Rows of an earlier generation count too, so only slices of the first can be known empty.
    used = [i for i in {row.slice_id for row in rows} if not slices[i].untouched]
    taken: set[tuple[int, int, int]] = set()
    if used:
        taken.update(tuple(key) for key in connection.execute(_STORED, {"ids": used}))
    fresh: list[ResultRow] = []
    sums: dict[int, _Sum] = {}
    for row in rows:
        key = (row.run_id, row.position, row.generation)
        if key in taken:
            continue
        taken.add(key)
        fresh.append(row)
        held = slices[row.slice_id]
        entry = sums.get(held.id) or sums.setdefault(held.id, _Sum())
        entry.add(row, current=row.epoch == held.epoch)
    if not fresh:
        return Stored(0, (), 0)
    now = next(iter(slices.values())).now
    copy_rows(connection, "result", _COLUMNS, _packed(fresh, instance, now))
    closed = _count(connection, sums)
    return Stored(len(fresh), closed, settle(connection, closed))


def _count(connection: Connection, sums: dict[int, _Sum]) -> list[int]:
    entries = list(sums.values())
    counted = connection.execute(
        _COUNT,
        {
            "ids": list(sums),
            "rows": [entry.rows for entry in entries],
            "completed": [entry.completed for entry in entries],
            "input_tokens": [entry.input_tokens for entry in entries],
            "cached_tokens": [entry.cached_tokens for entry in entries],
            "output_tokens": [entry.output_tokens for entry in entries],
            "reasoning_tokens": [entry.reasoning_tokens for entry in entries],
            "fruitful": [entry.fruitful for entry in entries],
            "missed": [entry.missed for entry in entries],
        },
    )
    return sorted(row.id for row in counted if row.remaining == 0)


_KEY = Struct(">hiqiiiii?").pack
_USAGE = Struct(">iqiq").pack


def _packed(rows: Sequence[ResultRow], instance: str | None, now: float) -> Iterator[bytes]:
    """Rows of `result` for COPY, in the order of `_COLUMNS`."""
    holder, stored_at = text(instance), float8(now)
    for row in rows:
        usage = row.usage
        yield b"".join(
            (
                _KEY(19, 8, row.run_id, 4, row.position, 4, row.generation, 1, row.ok),
                text(row.request_id),
                int4(row.status_code),
                text(row.body),
                text(row.error_code),
                text(row.error_message),
                _USAGE(8, usage.input_tokens, 8, usage.cached_tokens),
                _USAGE(8, usage.output_tokens, 8, usage.reasoning_tokens),
                holder,
                int4(row.epoch),
                float8(row.started_at),
                float8(row.first_token_s),
                float8(row.duration_s),
                stored_at,
            )
        )


_LEFT = sql(
    """
    SELECT s.id, r.position FROM slice s
    JOIN request r ON r.run_id = s.run_id AND r.position >= s.lo AND r.position < s.hi
    WHERE s.id = ANY(CAST(:ids AS bigint[]))
      AND NOT EXISTS (SELECT FROM result x
                      WHERE x.run_id = r.run_id AND x.position = r.position
                        AND (x.generation = s.generation OR x.ok))
    ORDER BY s.id, r.position
    """
)


def positions_left(connection: Connection, ids: Collection[int]) -> Sequence[tuple[int, int]]:
    """Slice and position of every line that still needs a row in its slice's generation."""
    return [(row.id, row.position) for row in connection.execute(_LEFT, {"ids": list(ids)})]
