"""The runner at work: slices, lines and leases, against a ledger and an engine steered by hand."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from qlm_batch.domain.engine import EngineAnswer, EngineRequest
from qlm_batch.domain.errors import Unavailable
from qlm_batch.domain.jobs import ResultRow
from qlm_batch.domain.ledger import Directive, FlushOutcome, ReleaseReason
from qlm_batch.scheduling import agent
from qlm_workers import link
from qlm_workers import runner as runner_module
from qlm_workers.exits import Exit
from tests.unit.runner_rig import (
    Rig,
    hang,
    heartbeats,
    hold_until,
    impatience,  # noqa: F401
    positions,
    until,
    working,
)
from tests.unit.worker_fakes import NOW, FakeEngine, FakeStore, dead, good, make_slice


async def test_every_request_of_every_slice_gets_one_row_and_the_slices_are_closed() -> None:
    slices = [make_slice(n, 7) for n in range(1, 31)]
    store = FakeStore(*slices)
    async with working(store, FakeEngine()):
        await until(lambda: store.completed == {s.slice_id for s in slices})
    counts = Counter(row.position for row in store.rows)
    assert set(counts) == positions(*slices)
    assert set(counts.values()) == {1}
    assert not store.released


async def test_rows_carry_ids_usage_times_and_the_fence() -> None:
    store = FakeStore(make_slice(1, 1, epoch=9))
    async with working(store, FakeEngine()):
        await until(lambda: store.rows)
    (row,) = store.rows
    assert row.request_id.startswith("req_")
    assert (row.epoch, row.generation, row.status_code, row.usage.output_tokens) == (9, 1, 200, 3)
    assert row.started_at is not None
    assert NOW <= row.started_at <= NOW + 60
    assert row.duration_s is not None


async def test_the_engine_gets_the_deadline_as_priority_and_the_tenant_as_salt() -> None:
    store = FakeStore(make_slice(1, 1))
    engine = FakeEngine()
    async with working(store, engine):
        await until(lambda: engine.requests)
    (request,) = engine.requests
    assert request.priority == agent.engine_priority(NOW + 3600)
    assert request.cache_salt
    assert request.cache_salt != "t"


async def test_no_more_is_claimed_and_fed_than_the_rules_allow() -> None:
    store = FakeStore(*(make_slice(n, 2) for n in range(1, 200)))
    engine = FakeEngine(hang, slots=8)
    async with working(store, engine):
        await until(lambda: engine.running == agent.concurrency_cap(8))
        await heartbeats(store, 3)
        assert engine.most_running == agent.concurrency_cap(8)
        assert sum(2 for _ in range(200 - 1 - len(store._waiting))) <= 2 * 8


async def test_a_hint_is_acted_on_at_once_and_one_for_another_boot_is_not() -> None:
    store = FakeStore()
    async with working(store, FakeEngine(), poll_s=60.0) as rig:
        await until(lambda: store.claims)
        store.put(make_slice(1))
        before = len(store.claims)
        rig.runner.wake("an older boot")
        await heartbeats(store, 3)
        assert len(store.claims) == before
        rig.runner.wake("boot")
        await until(lambda: store.completed == {1})


async def test_without_any_hint_assigned_slices_are_found_by_polling() -> None:
    store = FakeStore()
    async with working(store, FakeEngine()):
        await until(lambda: store.claims)
        store.put(make_slice(1))
        await until(lambda: store.completed == {1})


@pytest.mark.parametrize("order", [Directive.CLOSED, Directive.LOST])
async def test_a_closed_or_lost_slice_stops_inside_the_engine_and_is_let_go(
    order: Directive,
) -> None:
    store = FakeStore(make_slice(1))
    engine = FakeEngine(hang)
    async with working(store, engine) as rig:
        await until(lambda: engine.running == 4)
        store.orders[1] = order
        rig.runner.review()
        await until(lambda: engine.running == 0)
        store.put(make_slice(2))
        engine.respond = lambda _: good()
        await until(lambda: store.completed == {2})
    assert 1 not in store.released


async def test_a_preempted_slice_keeps_its_finished_lines_and_gives_back_the_rest() -> None:
    done = iter([good(), good()])
    store = FakeStore(make_slice(1, 4))
    engine = FakeEngine(lambda _: next(done, None))
    async with working(store, engine) as rig:
        await until(lambda: len(store.rows) == 2)
        store.orders[1] = Directive.PREEMPT
        rig.runner.review()
        await until(lambda: store.released)
        assert store.released == {1: ReleaseReason.PREEMPTED}
        assert engine.running == 0
    assert len(store.rows) == 2


async def test_a_line_past_its_deadline_ends_with_batch_expired_even_while_it_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link, "CLOCK_CHECK_S", 0.0)
    store = FakeStore(make_slice(1, 3))
    engine = FakeEngine(hang)
    async with working(store, engine):
        await until(lambda: engine.running == 3)
        store.ahead_s = 3600.0
        await until(lambda: store.completed == {1})
        assert engine.running == 0
    assert {row.error_code for row in store.rows} == {"batch_expired"}
    assert all(row.error_message for row in store.rows)


async def test_a_line_already_past_its_own_deadline_never_reaches_the_engine() -> None:
    store = FakeStore(make_slice(1, 3, deadline=NOW - 1))
    engine = FakeEngine()
    async with working(store, engine):
        await until(lambda: store.completed == {1})
    assert not engine.requests
    assert len(store.positions(ok=False)) == 3


async def test_a_batch_that_finishes_late_is_served_after_its_deadline() -> None:
    store = FakeStore(make_slice(1, 3, expires_at=None, deadline=NOW - 1))
    async with working(store, FakeEngine()):
        await until(lambda: store.completed == {1})
    assert len(store.positions()) == 3


async def test_an_engines_death_blames_only_what_was_inside() -> None:
    store = FakeStore(make_slice(1, 10), make_slice(2, 6))
    engine, gate = FakeEngine(dead, slots=8), asyncio.Event()
    hold_until(gate, engine)
    rig = Rig(store, engine)
    await until(lambda: rig.runner._table.in_hand == 16)
    gate.set()
    assert await rig.ended() is Exit.ENGINE_DIED
    assert store.released == {1: ReleaseReason.ENGINE_DIED, 2: ReleaseReason.SHUTDOWN}
    assert engine.stopped


async def test_slices_of_a_healthy_neighbour_are_not_blamed_for_a_death() -> None:
    store = FakeStore(make_slice(1, 4, model="m"), make_slice(2, 4, model="other"))
    first, second = FakeEngine(hang), FakeEngine(hang)
    rig = Rig(store, first, second)
    await until(lambda: first.running == 4 and second.running == 4)
    first.respond = dead
    store.put(make_slice(3, 1, model="m"))
    assert await rig.ended() is Exit.ENGINE_DIED
    assert store.released[1] is ReleaseReason.ENGINE_DIED
    assert store.released[2] is ReleaseReason.SHUTDOWN


async def test_results_made_before_a_death_are_stored() -> None:
    answers = iter([good(), good()])
    store = FakeStore(make_slice(1, 3))
    engine = FakeEngine(lambda r: next(answers, None) or dead(r))
    rig = Rig(store, engine, flush_s=60.0)
    assert await rig.ended() is Exit.ENGINE_DIED
    assert len(store.positions()) == 2


async def test_a_passing_fault_is_retried_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "RETRY_DELAYS_S", (0.001, 0.001))
    said: list[EngineAnswer | Exception] = [EngineAnswer(503, "{}"), RuntimeError("x"), good()]
    store = FakeStore(make_slice(1, 1))
    async with working(store, FakeEngine(lambda _: said.pop(0))):
        await until(lambda: store.completed == {1})
    assert store.positions() == {100}


async def test_a_lasting_fault_becomes_the_lines_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "RETRY_DELAYS_S", (0.001, 0.001))
    store = FakeStore(make_slice(1, 1), make_slice(2, 1), make_slice(3, 1))
    said = {0: EngineAnswer(500, '{"error":{}}'), 1: TimeoutError("60 s"), 2: RuntimeError("bad")}
    engine = FakeEngine(lambda r: said[r.priority % 3])
    async with working(store, engine):
        await until(lambda: store.completed == {1, 2, 3})
    assert not store.positions()
    assert len(engine.requests) == 9


async def test_a_bad_request_is_an_error_row_and_not_retried() -> None:
    store = FakeStore(make_slice(1, 1))
    engine = FakeEngine(lambda _: EngineAnswer(400, '{"error":{}}'))
    async with working(store, engine):
        await until(lambda: store.completed == {1})
    assert len(engine.requests) == 1
    assert store.rows[0].status_code == 400


async def test_a_slice_of_an_unknown_model_is_given_back_as_unsuitable() -> None:
    store = FakeStore(make_slice(1, model="nobody"), make_slice(2))
    async with working(store, FakeEngine()):
        await until(lambda: store.completed == {2} and store.released)
    assert store.released == {1: ReleaseReason.UNSUITABLE}


async def test_a_suspect_slice_runs_alone() -> None:
    store = FakeStore(make_slice(1), make_slice(2, suspect=True), make_slice(3))
    engine = FakeEngine(slots=64)
    gate = asyncio.Event()
    alone: list[int] = []

    async def answer(request: EngineRequest) -> EngineAnswer:
        alone.append(len(rig.runner._table.leases))
        if len(alone) > 4:
            await gate.wait()
        return good()

    engine.answer = answer  # type: ignore[method-assign]
    async with working(store, engine) as rig:
        await until(lambda: len(alone) == 8)
        assert len(rig.runner._table.leases) == 1
        gate.set()
        await until(lambda: store.completed == {1, 2, 3})


async def test_an_outage_of_the_store_loses_nothing() -> None:
    slices = [make_slice(n, 5) for n in range(1, 9)]
    store = FakeStore(*slices)
    engine, gate = FakeEngine(), asyncio.Event()
    hold_until(gate, engine)
    async with working(store, engine) as rig:
        await until(lambda: rig.runner._table.in_hand >= 15)
        store.away = True
        gate.set()
        await until(lambda: rig.runner._table.in_hand == 0)
        assert not store.rows
        store.away = False
        await until(lambda: store.completed == {s.slice_id for s in slices})
    assert {row.position for row in store.rows} == positions(*slices)


async def test_too_many_unsent_rows_stop_the_claiming(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "MOST_BUFFERED_ROWS", 10)
    store = FakeStore(*(make_slice(n, 5) for n in range(1, 50)))

    def no_flush(*_: Any, **__: Any) -> Any:
        raise Unavailable("the database is away")

    flush, store.flush = store.flush, no_flush  # type: ignore[method-assign]
    async with working(store, FakeEngine(slots=4)) as rig:
        await until(lambda: rig.runner._table.buffered > 10)
        await heartbeats(store, 3)
        claims = len(store.claims)
        await heartbeats(store, 3)
        more = len(store.claims) - claims
        store.flush = flush  # type: ignore[method-assign]
        await until(lambda: len(store.completed) == 49)
    assert not more


async def test_a_row_the_store_cannot_take_costs_only_itself() -> None:
    store = FakeStore(*(make_slice(n, 5) for n in range(1, 5)))
    flush = store.flush

    def picky(instance: str, rows: Sequence[ResultRow], *args: Any, **kwargs: Any) -> FlushOutcome:
        if any(row.position == 203 and row.ok for row in rows):
            raise ValueError("a body this database cannot hold")
        return flush(instance, rows, *args, **kwargs)

    store.flush = picky  # type: ignore[method-assign]
    async with working(store, FakeEngine(slots=32)):
        await until(lambda: store.completed == {1, 2, 3, 4})
    assert store.positions(ok=False) == {203}
    assert len(store.rows) == 20


async def test_a_store_that_takes_nothing_at_all_costs_no_result() -> None:
    store = FakeStore(make_slice(1, 5))
    flush, failing = store.flush, iter(range(12))

    def broken(*args: Any, **kwargs: Any) -> FlushOutcome:
        if next(failing, None) is not None:
            raise RuntimeError("a fault of the store")
        return flush(*args, **kwargs)

    store.flush = broken  # type: ignore[method-assign]
    async with working(store, FakeEngine()):
        await until(lambda: store.completed == {1}, 15.0)
    assert len(store.positions()) == 5


def test_a_store_that_never_answers_does_not_keep_a_worker_from_ending(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner_module, "LAST_FLUSH_S", 0.05)
    asked, answer = threading.Event(), threading.Event()
    verdicts: list[Exit] = []

    def silent(*_: Any, **__: Any) -> Any:
        asked.set()
        answer.wait()
        raise Unavailable("the database is away")

    async def serve() -> None:
        store = FakeStore(make_slice(1, 1))
        monkeypatch.setattr(store, "flush", silent)
        monkeypatch.setattr(store, "retire", silent)
        rig = Rig(store, FakeEngine())
        await until(asked.is_set)
        rig.runner.end(Exit.OK)
        verdicts.append(await rig.ended())

    # In a thread: a loop that spins would not let a time-out of its own through.
    worker = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    worker.start()
    worker.join(10)
    answer.set()
    assert verdicts == [Exit.OK]


async def test_leases_are_renewed_while_the_engine_works() -> None:
    store = FakeStore(make_slice(1))
    engine = FakeEngine(hang)
    async with working(store, engine, lease_s=0.08):
        await until(lambda: store.renewals.get(1, 0) >= 3)


async def test_leases_are_renewed_while_the_store_has_no_room_for_rows() -> None:
    store = FakeStore(make_slice(1, 5))
    flush, full = store.flush, True

    def without_room(instance: str, rows: Sequence[ResultRow], *args: Any, **kwargs: Any) -> Any:
        if rows and full:
            raise Unavailable("the disk is full")
        return flush(instance, rows, *args, **kwargs)

    store.flush = without_room  # type: ignore[method-assign]
    async with working(store, FakeEngine(), lease_s=0.08):
        await until(lambda: store.renewals.get(1, 0) >= 3)
        assert not store.rows
        full = False
        await until(lambda: store.completed == {1})
    assert len(store.positions()) == 5
