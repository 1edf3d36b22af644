"""Models taking turns in a worker, against a ledger and engines steered by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs

from qlm_batch.domain.errors import EngineDead
from qlm_batch.domain.ledger import ReleaseReason
from qlm_batch.domain.snapshot import InstanceState, ModelView, Residency
from qlm_batch.scheduling import swapping
from qlm_workers import link
from qlm_workers.exits import Exit
from tests.unit.runner_rig import hang, heartbeats, hold_until, positions, until, working
from tests.unit.worker_fakes import FakeEngine, FakeStore, good, make_slice


@pytest.fixture(autouse=True)
def _impatience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(link, "BACKOFF_S", (0.005,))
    monkeypatch.setattr(swapping, "RETRY_DELAYS_S", (0.005, 0.005))
    with capture_logs():
        yield


def seen(store: FakeStore, model: str) -> list[ModelView]:
    """What heartbeats told about the model, in order."""
    return [view for beat in store.beats for view in beat.models if view.name == model]


def is_told(store: FakeStore, model: str, residency: Residency) -> bool:
    """Whether the last heartbeat says this of the model."""
    return any(view.residency is residency for view in seen(store, model)[-1:])


async def test_only_as_many_models_as_fit_are_awake_at_the_start() -> None:
    store = FakeStore()
    async with working(store, FakeEngine(), FakeEngine(), models_awake=1):
        await until(lambda: any(beat.state is InstanceState.READY for beat in store.beats))
        told = {view.name: view.residency for view in store.beats[-1].models}
    assert told == {"m": Residency.AWAKE, "other": Residency.COLD}


async def test_work_of_a_cold_model_makes_the_instance_swap_and_is_done() -> None:
    store = FakeStore(make_slice(1, 4))
    first, second = FakeEngine(), FakeEngine()
    async with working(store, first, second, models_awake=1):
        await until(lambda: store.completed == {1})
        store.put(make_slice(2, 4, model="other"))
        await until(lambda: store.completed == {1, 2})
        await until(lambda: is_told(store, "other", Residency.AWAKE))
    assert first.slept == 1
    assert len(second.requests) == 4
    assert not store.released
    assert seen(store, "m")[-1].residency is Residency.COLD
    assert seen(store, "other")[-1].swaps == 1


async def test_while_nothing_is_awake_the_instance_says_that_it_swaps() -> None:
    store = FakeStore(make_slice(1, 1, model="other"))
    second = FakeEngine()
    second.may_wake.clear()
    async with working(store, FakeEngine(), second, models_awake=1):
        await until(lambda: store.beats and store.beats[-1].state is InstanceState.SWAPPING)
        assert store.beats[-1].phase == "waking other"
        second.may_wake.set()
        await until(lambda: store.completed)
        await until(lambda: store.beats[-1].state is InstanceState.READY)
    assert store.beats[-1].phase == ""


async def test_what_is_inside_ends_before_its_model_sleeps() -> None:
    store = FakeStore(make_slice(1, 4))
    first, second = FakeEngine(), FakeEngine()
    gate = asyncio.Event()
    hold_until(gate, first)
    async with working(store, first, second, models_awake=1):
        await until(lambda: store.claims)
        store.put(make_slice(2, 1, model="other"))
        await until(lambda: any(holding for _, holding in store.claims))
        assert not first.slept
        gate.set()
        await until(lambda: store.completed == {1, 2})
    assert first.slept == 1
    assert not store.released


async def test_urgent_work_of_another_model_sends_long_work_back_without_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(swapping, "STAY_SWAPS", 0.0)
    store = FakeStore(make_slice(1, 4))
    first, second = FakeEngine(), FakeEngine()
    first.respond = lambda _: None
    async with working(store, first, second, models_awake=1):
        await until(lambda: first.running == 4)
        store.put(make_slice(2, 2, model="other", due_in=60.0))
        await until(lambda: 2 in store.completed)
    assert store.released == {1: ReleaseReason.PREEMPTED}
    assert len(first.aborted) == 4
    assert store.positions() == positions(make_slice(2, 2))


async def test_an_engine_that_keeps_goes_on_with_what_was_inside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(swapping, "STAY_SWAPS", 0.0)
    monkeypatch.setattr(swapping, "DRAIN_SWAPS", 0.0)
    store = FakeStore(make_slice(1, 4))
    first, second = FakeEngine(), FakeEngine()
    first.keeps = second.keeps = True
    gate, told = asyncio.Event(), asyncio.Event()
    hold_until(gate, first)
    hold_until(told, second)
    async with working(store, first, second, models_awake=1):
        await until(lambda: store.claims)
        store.put(make_slice(2, 2, model="other", due_in=60.0))
        await until(lambda: any(m.residency is Residency.ASLEEP for m in seen(store, "m")))
        told.set()
        await until(lambda: 2 in store.completed)
        gate.set()
        await until(lambda: store.completed == {1, 2})
    assert not first.aborted
    assert not store.released


async def test_a_model_that_does_not_wake_at_first_is_tried_again() -> None:
    store = FakeStore(make_slice(1, 2, model="other"))
    second = FakeEngine()
    second.wake_errors = [EngineDead("not yet"), TimeoutError()]
    async with working(store, FakeEngine(), second, models_awake=1):
        await until(lambda: store.completed == {1})
    assert not store.released
    assert second.stopped


async def test_a_model_that_never_wakes_is_marked_and_its_work_goes_elsewhere() -> None:
    store = FakeStore(make_slice(1, 2, model="other"))
    first, second = FakeEngine(), FakeEngine()
    second.wake_errors = [EngineDead("never") for _ in range(3)]
    async with working(store, first, second, models_awake=1):
        await until(lambda: store.released)
        await until(lambda: is_told(store, "other", Residency.FAILED))
        assert seen(store, "other")[-1].fault == "never"
        store.put(make_slice(2, 2))
        await until(lambda: store.completed == {2})
        store.put(make_slice(3, 2, model="other"))
        await until(lambda: 3 in store.released)
    assert store.released == dict.fromkeys((1, 3), ReleaseReason.PREEMPTED) | {
        3: ReleaseReason.UNSUITABLE
    }


async def test_a_failed_model_is_tried_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swapping, "FAILED_FOR_S", 0.2)
    store = FakeStore(make_slice(1, 2, model="other"))
    second = FakeEngine()
    second.wake_errors = [EngineDead("not yet") for _ in range(3)]
    async with working(store, FakeEngine(), second, models_awake=1):
        await until(lambda: store.released)
        # It was cold before it failed, too.
        await heartbeats(store, 2)
        await until(lambda: is_told(store, "other", Residency.COLD))
        store.put(make_slice(2, 2, model="other"))
        await until(lambda: store.completed == {2})


async def test_an_engine_that_will_not_sleep_is_ended() -> None:
    store = FakeStore(make_slice(1, 2, model="other"))
    first, second = FakeEngine(), FakeEngine()

    async def refuse() -> Residency:
        raise EngineDead("no")

    first.sleep = refuse  # type: ignore[method-assign]
    async with working(store, first, second, models_awake=1):
        await until(lambda: store.completed == {1})
        assert first.stopped
        await until(lambda: is_told(store, "m", Residency.COLD))


async def test_a_worker_with_no_model_left_ends_so_that_it_is_started_anew() -> None:
    store = FakeStore(make_slice(1, 2, model="other"))
    first, second = FakeEngine(), FakeEngine()
    first.wake_errors = [EngineDead("no") for _ in range(9)]
    second.wake_errors = [EngineDead("no") for _ in range(9)]
    async with working(store, first, second, models_awake=1) as rig:
        assert await rig.ended() is Exit.ENGINE_DIED
    assert store.released == {1: ReleaseReason.PREEMPTED}


async def test_the_end_during_a_swap_gives_everything_back() -> None:
    store = FakeStore(make_slice(1, 2, model="other"))
    first, second = FakeEngine(), FakeEngine()
    second.may_wake.clear()
    async with working(store, first, second, models_awake=1) as rig:
        await until(lambda: store.beats and store.beats[-1].state is InstanceState.SWAPPING)
        rig.runner.end(Exit.OK)
        assert await rig.ended() is Exit.OK
    assert store.released == {1: ReleaseReason.SHUTDOWN}
    assert second.stopped


async def test_leases_are_renewed_while_their_model_is_loaded() -> None:
    store = FakeStore(make_slice(1, 2, model="other"))
    second = FakeEngine()
    second.may_wake.clear()
    async with working(store, FakeEngine(), second, models_awake=1, lease_s=0.08):
        await until(lambda: store.renewals.get(1, 0) >= 3)
        second.may_wake.set()
        await until(lambda: store.completed == {1})


async def test_what_an_engine_kept_goes_back_where_it_does_not_wake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(swapping, "STAY_SWAPS", 0.0)
    monkeypatch.setattr(swapping, "DRAIN_SWAPS", 0.0)
    store = FakeStore(make_slice(1, 4))
    first, second = FakeEngine(), FakeEngine()
    first.keeps = second.keeps = True
    first.respond = lambda _: None
    async with working(store, first, second, models_awake=1):
        await until(lambda: first.running == 4)
        first.wake_errors = [EngineDead("no")]
        store.put(make_slice(2, 2, model="other", due_in=60.0))
        await until(lambda: store.released)
        assert store.released == {1: ReleaseReason.PREEMPTED}
        await until(lambda: is_told(store, "m", Residency.AWAKE))
        first.respond = lambda _: good()
        store.put(make_slice(3, 4))
        await until(lambda: store.completed == {2, 3})


async def test_a_swap_that_takes_too_long_is_given_up() -> None:
    store = FakeStore(make_slice(1, 2, model="other"))
    first, second = FakeEngine(), FakeEngine()
    second.may_wake.clear()
    async with working(store, first, second, models_awake=1, swap_timeout_s=0.05):
        await until(lambda: store.released == {1: ReleaseReason.PREEMPTED})
        assert second.stopped
        store.put(make_slice(2, 2))
        await until(lambda: store.completed == {2})
        await until(lambda: is_told(store, "other", Residency.FAILED))


async def test_a_draining_worker_swaps_no_more() -> None:
    store = FakeStore(make_slice(1, 2))
    first, second = FakeEngine(), FakeEngine()
    gate = asyncio.Event()
    hold_until(gate, first)
    async with working(store, first, second, models_awake=1) as rig:
        await until(lambda: store.claims)
        store.put(make_slice(2, 2, model="other"))
        await until(lambda: not store.waiting)
        rig.runner.drain(30.0)
        await until(lambda: 2 in store.released)
        gate.set()
        assert await rig.ended() is Exit.OK
    assert store.completed == {1}
    assert not second.requests


async def test_counters_go_on_where_an_engine_is_started_anew() -> None:
    store = FakeStore(make_slice(1, 4))
    first, second = FakeEngine(), FakeEngine()
    async with working(store, first, second, models_awake=1):
        await until(lambda: store.beats and store.beats[-1].output_tokens == 12)
        store.put(make_slice(2, 4, model="other"))
        await until(lambda: store.beats[-1].output_tokens == 24)
        first.step = 0
        store.put(make_slice(3, 4))
        await until(lambda: store.beats[-1].output_tokens == 36)
    totals = [beat.output_tokens for beat in store.beats]
    assert totals == sorted(totals)


async def test_what_a_model_keeps_goes_back_when_it_falls_asleep_after_the_drain_began(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("STAY_SWAPS", "DRAIN_SWAPS", "CALLS_SWAPS"):
        monkeypatch.setattr(swapping, name, 0.0)
    store = FakeStore(make_slice(1, 4))
    first, second = FakeEngine(hang), FakeEngine()
    first.keeps = second.keeps = True
    async with working(store, first, second, models_awake=1) as rig:
        await until(lambda: first.running == 4)
        host = rig.runner._hosts["m"]
        host.interactive = 1
        store.put(make_slice(2, 2, model="other", due_in=60.0))
        await until(lambda: not host.open)
        rig.runner.drain(30.0)
        host.interactive = 0
        assert await rig.ended() is Exit.OK
    assert store.released == dict.fromkeys((1, 2), ReleaseReason.PREEMPTED)
