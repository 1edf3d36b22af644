"""Where interactive requests go."""

from __future__ import annotations

from dataclasses import replace

from qlm_batch.domain.jobs import EngineKind
from qlm_batch.domain.snapshot import InstanceState, InstanceView, ModelView, Residency
from qlm_batch.scheduling.routing import Boot, Full, Route, route, start_in

AWAKE = ModelView("m", EngineKind.GENERATE, Residency.AWAKE, 2048)
ASLEEP = replace(AWAKE, residency=Residency.ASLEEP, wake_s=3.0)


def instance(name: str = "a", *, busy: int = 0, **changes: object) -> InstanceView:
    view = InstanceView(
        name=name,
        boot_id="boot",
        device="cpu",
        state=InstanceState.READY,
        models=(AWAKE,),
        slots=4,
        kv_tokens=1000,
        running=busy,
        interactive_running=busy,
    )
    return replace(view, **changes)  # type: ignore[arg-type]


def name_of(*views: InstanceView, **changes: object) -> str | None:
    found = route(views, "m", **{"sent": {}, "service_s": 1.0, **changes})  # type: ignore[arg-type]
    return found.instance if isinstance(found, Route) else None


def test_an_instance_with_a_free_slot_comes_before_one_without() -> None:
    assert name_of(instance("a", busy=4), instance("b", busy=1)) == "b"


def test_among_those_that_start_at_once_the_least_loaded_is_taken() -> None:
    assert name_of(instance("a", busy=3), instance("b", busy=2)) == "b"


def test_batch_work_is_no_obstacle() -> None:
    assert name_of(instance("a", running=40), instance("b", busy=5)) == "a"


def test_among_full_ones_that_start_at_once_interactive_work_is_spread() -> None:
    sent: dict[Boot, int] = {("a", "boot"): 2, ("b", "boot"): 1}
    assert name_of(instance("a", running=4), instance("b", running=5), sent=sent) == "b"


def test_what_was_sent_and_not_yet_reported_counts() -> None:
    sent: dict[Boot, int] = {("a", "boot"): 6}
    assert name_of(instance("a"), instance("b", busy=4), sent=sent) == "b"


def test_what_an_earlier_boot_was_sent_does_not_count() -> None:
    sent: dict[Boot, int] = {("a", "old"): 9}
    found = route([instance("a")], "m", sent=sent, service_s=1.0)
    assert found == Route("a", "boot", 0.0)


def test_a_model_that_sleeps_is_woken_only_where_waiting_takes_longer() -> None:
    sleeper = instance("b", models=(ASLEEP,))
    assert name_of(instance("a", busy=5), sleeper) == "a"
    assert name_of(instance("a", busy=15), sleeper, service_s=2.0) == "b"


def test_an_instance_still_starting_is_the_last_resort() -> None:
    starting = instance("b", state=InstanceState.STARTING)
    assert name_of(instance("a", busy=8), starting) == "a"
    assert name_of(starting) == "b"


def test_nobody_serves_it_where_instances_leave_are_lost_or_host_another_model() -> None:
    views = [
        instance("a", state=InstanceState.DRAINING),
        instance("b", state=InstanceState.LOST),
        instance("c", models=(replace(AWAKE, name="other"),)),
    ]
    assert route(views, "m", sent={}, service_s=1.0) is None
    assert route([], "m", sent={}, service_s=1.0) is None


def test_a_boot_that_sent_the_request_back_is_passed_over() -> None:
    assert name_of(instance("a"), instance("b", busy=3), avoid={("a", "boot")}) == "b"
    assert name_of(instance("a"), avoid={("a", "boot")}) is None


def test_full_queues_say_when_there_is_room_again() -> None:
    views = [instance("a", busy=20), instance("b", busy=17)]
    assert route(views, "m", sent={}, service_s=2.0) == Full(retry_after_s=1.0)
    assert name_of(*views, instance("c", busy=15)) == "c"


def test_the_wait_is_the_queue_ahead_over_the_slots() -> None:
    assert start_in(3, 4, 2.0) == 0.0
    assert start_in(4, 4, 2.0) == 0.5
    assert start_in(11, 4, 2.0) == 4.0
