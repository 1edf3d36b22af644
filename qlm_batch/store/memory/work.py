"""What happens to slices: placing, rows, closing, losing. The caller holds the lock.

Sums per run and per instance are kept as slices move, so that no caller counts requests again.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from qlm_batch.domain.jobs import BatchState, OutboxItem, ResultRow, SliceState
from qlm_batch.domain.ledger import Reaped
from qlm_batch.domain.transitions import (
    EVENT_OF,
    OPEN_SLICE,
    SUSPECT_AFTER,
    TERMINAL,
    AfterLoss,
    after_lost_lease,
)
from qlm_batch.ids import EVENT, new_id
from qlm_batch.store.memory.state import (
    BatchData,
    OutboxData,
    Part,
    RunData,
    SliceData,
    State,
    Tally,
    change,
)

POISON = "engine_crashed"
EXPIRED_LINE = "batch_expired"


def left(part: SliceData) -> list[int]:
    """Positions that still need a row in the slice's generation."""
    run, rows = part.run, part.run.rows[part.generation]
    return [p for p in range(part.lo, part.hi) if p not in rows and p not in run.successes]


def measure(part: SliceData) -> SliceData:
    """Sum up what is left of a slice that is not placed anywhere yet."""
    lines = [part.run.lines[position] for position in left(part)]
    part.remaining = len(lines)
    part.prompt_tokens = sum(line.prompt_tokens for line in lines)
    part.max_tokens = sum(line.max_tokens or 0 for line in lines)
    part.unbounded = sum(line.max_tokens is None for line in lines)
    return part


def add(state: State, batch: BatchData, part: SliceData) -> None:
    """Take a fresh slice in, queued."""
    state.slices[part.id] = part
    batch.slices.append(part)
    batch.open.add(part.id)
    if part.expires_at is not None:
        heapq.heappush(state.expiring, (part.expires_at, part.id))
    _enter(state, part)


def new_slice(
    state: State,
    run: RunData,
    generation: int,
    lo: int,
    hi: int,
    expires_at: float | None,
    deadline: float,
) -> SliceData:
    """A slice over positions [lo, hi), measured and not placed yet."""
    return measure(SliceData(state.next("slice"), run, generation, lo, hi, deadline, expires_at))


def move(state: State, part: SliceData, to: SliceState, *, instance: str | None = None) -> None:
    """Put a slice into another state, and the sums with it."""
    _leave(state, part)
    part.state, part.instance = to, instance
    _enter(state, part)


def _tally(state: State, part: SliceData) -> Tally:
    home = state.queued if part.instance is None else state.placed[part.instance]
    key = part.part
    tally = home.get(key)
    if tally is None:
        tally = home[key] = Tally()
    return tally


def _count(state: State, part: SliceData, sign: int) -> None:
    tally = _tally(state, part)
    tally.slices += sign
    tally.leased += sign * (part.state is SliceState.LEASED)
    tally.suspects += sign * (part.attempts >= SUSPECT_AFTER)
    tally.requests += sign * part.remaining
    tally.prompt_tokens += sign * part.prompt_tokens
    tally.max_tokens += sign * part.max_tokens
    tally.unbounded += sign * part.unbounded
    if tally.slices == 0:
        home = state.queued if part.instance is None else state.placed[part.instance]
        del home[part.part]


def _enter(state: State, part: SliceData) -> None:
    if part.state not in OPEN_SLICE:
        return
    _count(state, part, 1)
    if part.instance is None:
        heapq.heappush(state.waiting[part.part], (part.attempts, part.id))
    elif part.state is SliceState.ASSIGNED:
        state.assigned[part.instance][part.id] = part
    else:
        state.leased[part.instance][part.id] = part


def _leave(state: State, part: SliceData) -> None:
    _count(state, part, -1)
    if part.instance is not None:
        state.assigned[part.instance].pop(part.id, None)
        state.leased[part.instance].pop(part.id, None)


def take_queued(state: State, key: Part) -> SliceData | None:
    """Take the queued slice of a run and generation to place next: trusted first, then by id."""
    heap = state.waiting.get(key)
    while heap:
        attempts, slice_id = heapq.heappop(heap)
        part = state.slices[slice_id]
        if part.state is SliceState.QUEUED and part.attempts == attempts:
            return part
    state.waiting.pop(key, None)
    return None


def store_row(state: State, part: SliceData, row: ResultRow) -> bool:
    """Store a row of an open slice unless its line has one; close the slice with its last row."""
    run, position = part.run, row.position
    rows = run.rows[part.generation]
    if position in rows or position in run.successes:
        return False
    rows[position] = row
    line, tally, batch = run.lines[position], _tally(state, part), state.batches[run.batch_id]
    prompt, most = line.prompt_tokens, line.max_tokens
    part.remaining -= 1
    tally.requests -= 1
    part.prompt_tokens -= prompt
    tally.prompt_tokens -= prompt
    if most is None:
        part.unbounded -= 1
        tally.unbounded -= 1
    else:
        part.max_tokens -= most
        tally.max_tokens -= most
    if row.epoch == part.epoch:
        part.fruitful = True
    if row.ok:
        run.successes.add(position)
        due = line.deadline if part.generation == 1 and line.deadline else batch.view.deadline
        if state.clock() > due:
            run.late.add(position)
        batch.completed += 1
    else:
        batch.failed += 1
        if row.error_code == EXPIRED_LINE and batch.view.deadline <= state.clock():
            batch.missed = True
    batch.usage += row.usage
    if part.remaining == 0:
        close(state, part, SliceState.DONE)
    return True


def close(state: State, part: SliceData, to: SliceState) -> bool:
    """Close an open slice; lines without a row count as failed.

    True when that settles its batch: it then waits for its files.
    """
    batch = state.batches[part.run.batch_id]
    move(state, part, to, instance=part.instance)
    part.preempt = False
    batch.open.discard(part.id)
    batch.failed += part.remaining
    part.remaining = part.prompt_tokens = part.max_tokens = part.unbounded = 0
    if to is SliceState.EXPIRED and batch.view.deadline <= state.clock():
        batch.missed = True
    if batch.open or batch.view.state is not BatchState.IN_PROGRESS:
        return False
    change(batch, state=BatchState.FINALIZING, finalizing_at=state.clock())
    return True


def requeue(state: State, part: SliceData) -> None:
    """Queue an assigned or leased slice again; a lease that brought rows clears the attempts."""
    _leave(state, part)
    if part.fruitful:
        part.attempts = 0
    part.fruitful = part.preempt = False
    part.state, part.instance = SliceState.QUEUED, None
    _enter(state, part)


def lose(state: State, parts: Iterable[SliceData]) -> Reaped:
    """Deal with leased slices whose lease ended without their holder's consent."""
    requeued = bisected = failed = finished = 0
    for part in parts:
        attempts = 0 if part.fruitful else part.attempts + 1
        match after_lost_lease(attempts, part.remaining):
            case AfterLoss.REQUEUE:
                _queue_with(state, part, attempts)
                requeued += 1
            case AfterLoss.BISECT:
                _bisect(state, part)
                bisected += 1
            case AfterLoss.FAIL_LINE:
                failed += part.remaining
                _fail_lines(state, part)
                finished += is_settled(state, part)
    return Reaped(
        requeued=requeued, bisected=bisected, failed_lines=failed, finished_batches=finished
    )


def is_settled(state: State, part: SliceData) -> bool:
    """Whether the slice's batch waits for its files now."""
    return state.batches[part.run.batch_id].view.state is BatchState.FINALIZING


def _queue_with(state: State, part: SliceData, attempts: int) -> None:
    _leave(state, part)
    part.attempts, part.fruitful, part.preempt = attempts, False, False
    part.state, part.instance = SliceState.QUEUED, None
    _enter(state, part)


def _bisect(state: State, part: SliceData) -> None:
    positions = left(part)
    middle = positions[len(positions) // 2]
    _leave(state, part)
    upper = new_slice(
        state, part.run, part.generation, middle, part.hi, part.expires_at, part.deadline
    )
    part.hi = middle
    measure(part)
    for half in (part, upper):
        half.attempts, half.fruitful, half.preempt = SUSPECT_AFTER, False, False
        half.state, half.instance = SliceState.QUEUED, None
    _enter(state, part)
    add(state, state.batches[part.run.batch_id], upper)


def _fail_lines(state: State, part: SliceData) -> None:
    for position in left(part):
        store_row(
            state,
            part,
            ResultRow(
                slice_id=part.id,
                epoch=part.epoch,
                run_id=part.run.id,
                position=position,
                generation=part.generation,
                request_id=new_id("req_"),
                error_code=POISON,
                error_message="The inference engine stopped every time it worked on this line,"
                " the last times on this line alone.",
            ),
        )


def end(state: State, batch: BatchData, to: BatchState, **fields: object) -> None:
    """Turn a batch terminal and insert its outbox rows: one per channel, under one event id."""
    now = state.clock()
    change(batch, state=to, **{f"{to.value}_at": now}, **fields)
    batch.claim_holder = None
    if to in TERMINAL:
        state.unfinished.pop(batch.view.id, None)
    spec, event = batch.view.spec, new_id(EVENT)
    for channel, target in (("webhook", spec.callbacks.webhook), ("email", spec.callbacks.email)):
        if target is not None:
            number = state.next("outbox")
            item = OutboxItem(
                id=number,
                event_id=event,
                tenant=spec.tenant,
                batch_id=batch.view.id,
                generation=batch.view.generation,
                type=EVENT_OF[to],
                channel=channel,
                target=target,
                created_at=now,
                attempts=0,
            )
            state.outbox[number] = OutboxData(item, next_at=now)
