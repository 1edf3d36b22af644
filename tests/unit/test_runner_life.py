"""How a runner starts, tells of itself and ends, against a ledger and an engine steered by hand."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from qlm_batch.domain.engine import EngineStats
from qlm_batch.domain.errors import ConfigurationError, Unavailable
from qlm_batch.domain.ledger import ReleaseReason
from qlm_batch.domain.records import Heartbeat
from qlm_batch.domain.snapshot import InstanceState, Output, Residency
from qlm_workers.exits import Exit
from tests.unit.runner_rig import (
    Rig,
    hang,
    heartbeats,
    hold_until,
    impatience,  # noqa: F401
    until,
    working,
)
from tests.unit.worker_fakes import FakeEngine, FakeStore, good, make_slice


async def test_a_hung_engine_ends_the_worker_and_its_leases_are_left_to_run_out() -> None:
    store = FakeStore(make_slice(1))
    engine = FakeEngine(hang)
    rig = Rig(store, engine, stall_s=0.2)
    assert await rig.ended() is Exit.ENGINE_HUNG
    assert engine.stopped
    assert not store.released
    assert not store.retired


async def test_a_slow_engine_that_still_steps_is_not_taken_for_hung() -> None:
    store = FakeStore(make_slice(1))
    engine = FakeEngine(hang)
    stats = engine.stats

    def one_step_on() -> EngineStats:
        engine.step += 1
        return stats()

    engine.stats = one_step_on  # type: ignore[method-assign]
    async with working(store, engine, stall_s=0.01) as rig:
        await until(lambda: engine.running == 4)
        await heartbeats(store, 15)
        assert not rig.task.done()


async def test_an_idle_engine_is_never_taken_for_hung() -> None:
    store = FakeStore()
    async with working(store, FakeEngine(), stall_s=0.01) as rig:
        await until(lambda: len(store.beats) >= 15)
        assert not rig.task.done()


async def test_a_newer_boot_makes_this_one_drop_everything() -> None:
    store = FakeStore(make_slice(1))
    engine = FakeEngine(hang)
    rig = Rig(store, engine)
    await until(lambda: engine.running == 4)
    store.replaced = True
    assert await rig.ended() is Exit.REPLACED
    assert not store.released
    assert not store.retired
    assert engine.stopped
    assert engine.running == 0


async def test_a_draining_worker_finishes_what_runs_and_claims_nothing() -> None:
    store = FakeStore(make_slice(1))
    engine, gate = FakeEngine(), asyncio.Event()
    hold_until(gate, engine)
    rig = Rig(store, engine, poll_s=60.0)
    await until(lambda: len(store.claims) == 2)
    rig.runner.drain(60.0)
    await until(lambda: store.beats and store.beats[-1].state is InstanceState.DRAINING)
    store.put(make_slice(2))
    rig.runner.wake()
    gate.set()
    assert await rig.ended() is Exit.OK
    assert store.completed == {1}
    assert not store.released
    assert store.retired


async def test_what_a_claim_brings_after_the_drain_began_goes_back_untouched() -> None:
    store = FakeStore(make_slice(1))
    engine, gate = FakeEngine(), asyncio.Event()
    hold_until(gate, engine)
    rig = Rig(store, engine)
    await until(lambda: rig.runner._table.in_hand == 4)
    store.may_tell.clear()
    store.put(make_slice(2), make_slice(3, model="other"), make_slice(4, model="unknown"))
    rig.runner.wake()
    await until(lambda: not store.waiting)
    rig.runner.drain(60.0)
    store.may_tell.set()
    await until(lambda: {2, 3, 4} <= store.released.keys())
    gate.set()
    assert await rig.ended() is Exit.OK
    assert store.completed == {1}
    assert len(engine.requests) == 4


async def test_a_drain_that_takes_too_long_gives_the_rest_back() -> None:
    store = FakeStore(make_slice(1))
    engine = FakeEngine(hang)
    rig = Rig(store, engine)
    await until(lambda: engine.running == 4)
    rig.runner.drain(0.1)
    assert await rig.ended() is Exit.OK
    assert store.released == {1: ReleaseReason.SHUTDOWN}
    assert len(engine.aborted) == 4


async def test_results_are_stored_at_the_end_even_if_the_store_was_away_a_moment() -> None:
    answers = iter([good(), good(), good()])
    store = FakeStore(make_slice(1, 4))
    engine = FakeEngine(lambda _: next(answers, None))
    rig = Rig(store, engine, flush_s=60.0)
    await until(lambda: engine.step == 3)
    store.away = True
    rig.runner.end(Exit.OK)
    for _ in range(20):
        await asyncio.sleep(0)
    assert not rig.task.done()
    store.away = False
    assert await rig.ended() is Exit.OK
    assert len(store.positions()) == 3
    assert store.released == {1: ReleaseReason.SHUTDOWN}


async def test_heartbeats_tell_of_the_start_and_then_of_the_engine() -> None:
    store = FakeStore()
    engine = FakeEngine()
    engine.may_start.clear()
    async with working(store, engine):
        await until(lambda: store.beats)
        first = store.beats[0]
        assert (first.state, first.phase) == (InstanceState.STARTING, "loading m")
        assert first.models[0].residency is Residency.COLD
        engine.may_start.set()
        await until(lambda: store.beats[-1].state is InstanceState.READY)
        last = store.beats[-1]
        assert (last.slots, last.kv_tokens, last.phase) == (8, 4096, "")
        assert last.models[0].residency is Residency.AWAKE
        assert last.models[0].max_model_len == 2048


async def test_observations_arrive_once_also_after_failed_heartbeats() -> None:
    store = FakeStore(*(make_slice(n, 5) for n in range(1, 5)))
    failing = iter([True] * 3)
    heartbeat = store.heartbeat

    def sometimes(beat: Heartbeat) -> bool:
        if beat.observations and next(failing, False):
            raise Unavailable("the database is away")
        return heartbeat(beat)

    store.heartbeat = sometimes  # type: ignore[method-assign]
    async with working(store, FakeEngine()):
        await until(lambda: len(store.rows) == 20)
        await heartbeats(store, 5)
    seen = [o for beat in store.beats for o in beat.observations]
    assert sum(o.requests for o in seen) == 20
    assert [pair for o in seen for pair in o.outputs] == [Output("t", 3, 8)] * 20
    assert sum(o.tokens for o in seen) == 60


async def test_what_is_told_of_an_answer_says_whether_a_bound_cut_it() -> None:
    store = FakeStore(make_slice(1, 3))
    async with working(store, FakeEngine(lambda _: replace(good(), cut=True))):
        await until(lambda: len(store.rows) == 3)
        await heartbeats(store, 5)
    told = [output for beat in store.beats for o in beat.observations for output in o.outputs]
    assert told == [Output("t", 3, 8, cut=True)] * 3


async def test_a_model_that_cannot_run_ends_the_worker_for_good() -> None:
    engine = FakeEngine()
    engine.start_error = ConfigurationError("no such model; name one that exists")
    rig = Rig(FakeStore(), engine)
    assert await rig.ended() is Exit.MISCONFIGURED


async def test_a_start_that_takes_too_long_ends_the_worker() -> None:
    engine = FakeEngine()
    engine.may_start.clear()
    rig = Rig(FakeStore(), engine, start_timeout_s=0.05)
    assert await rig.ended() is Exit.ENGINE_DIED
    assert engine.stopped


async def test_a_worker_told_to_stop_while_it_starts_ends_at_once() -> None:
    engine = FakeEngine()
    engine.may_start.clear()
    store = FakeStore()
    rig = Rig(store, engine)
    await until(lambda: store.beats)
    rig.runner.drain(60.0)
    assert await rig.ended() is Exit.OK
