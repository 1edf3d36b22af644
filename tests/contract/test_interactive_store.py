"""Interactive requests in both stores: one holder at a time, one end, and nothing forgotten."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qlm_batch.domain.errors import NotFound
from qlm_batch.domain.interactive import InteractiveMark, InteractiveState, NewInteractive
from qlm_batch.domain.jobs import CHAT, SloClass, Usage
from qlm_batch.domain.snapshot import Latency
from qlm_batch.store.interactive import UNSENT_GRACES
from tests.contract.harness import MODEL, TENANT, Bench

NEW = NewInteractive(
    "req_1", TENANT, CHAT, MODEL, '{"n":1}', True, 0.5, instance="gpu-0", boot_id="boot-1"
)
DONE = InteractiveMark(
    "req_1",
    1,
    InteractiveState.DONE,
    status_code=200,
    result="a\nb",
    usage=Usage(5, 1, 7, 2),
    first_token_s=0.1,
    duration_s=0.9,
)
RUNNING = InteractiveMark("req_1", 1, InteractiveState.RUNNING)
GRACE = 60.0


def state(bench: Bench, request_id: str = "req_1") -> InteractiveState:
    return bench.store.interactive(TENANT, request_id).state


def test_storing_a_request_leases_it_to_its_instance(bench: Bench) -> None:
    accepted_at = bench.store.add_interactive(NEW)
    assert abs(accepted_at - bench.store.now()) < 5
    stored = bench.store.interactive(TENANT, "req_1")
    assert (stored.instance, stored.boot_id, stored.epoch) == ("gpu-0", "boot-1", 1)
    assert (stored.body, stored.streamed, stored.ttft_s) == ('{"n":1}', True, 0.5)
    assert (stored.state, stored.created_at) == (InteractiveState.SENT, accepted_at)
    assert stored.ended_at is None


def test_a_request_of_another_tenant_does_not_exist(bench: Bench) -> None:
    bench.store.add_interactive(NEW)
    with pytest.raises(NotFound):
        bench.store.interactive("other", "req_1")
    with pytest.raises(NotFound):
        bench.store.interactive(TENANT, "req_2")


def test_its_end_is_stored_with_usage_and_timings(bench: Bench) -> None:
    bench.store.add_interactive(NEW)
    assert bench.store.mark_interactive([RUNNING]) == 1
    assert state(bench) is InteractiveState.RUNNING
    assert bench.store.mark_interactive([DONE]) == 1
    stored = bench.store.interactive(TENANT, "req_1")
    assert (stored.state, stored.status_code, stored.result) == (
        InteractiveState.DONE,
        200,
        "a\nb",
    )
    assert (stored.usage, stored.first_token_s, stored.duration_s) == (
        Usage(5, 1, 7, 2),
        0.1,
        0.9,
    )
    assert stored.ended_at is not None


def test_a_result_that_no_database_holds_does_not_keep_others_back(bench: Bench) -> None:
    bench.store.add_interactive(NEW)
    bench.store.add_interactive(replace(NEW, id="req_2"))
    odd = replace(DONE, result="a\0b\ud800")
    assert bench.store.mark_interactive([odd, replace(DONE, id="req_2")]) == 2
    assert state(bench) is state(bench, "req_2") is InteractiveState.DONE


@pytest.mark.parametrize(
    "ended", [InteractiveState.DONE, InteractiveState.FAILED, InteractiveState.ABORTED]
)
def test_an_ended_request_never_changes_again(bench: Bench, ended: InteractiveState) -> None:
    bench.store.add_interactive(NEW)
    bench.store.mark_interactive([replace(DONE, state=ended)])
    for late in InteractiveState:
        assert bench.store.mark_interactive([replace(DONE, state=late, result="late")]) == 0
    assert bench.store.reroute_interactive("req_1", 1, "gpu-1", "boot-1") is None
    stored = bench.store.interactive(TENANT, "req_1")
    assert (stored.state, stored.result) == (ended, "a\nb")


def test_the_last_mark_of_a_request_counts(bench: Bench) -> None:
    for n in range(3):
        bench.store.add_interactive(replace(NEW, id=f"req_{n}"))
    marks = [replace(RUNNING, id=f"req_{n}") for n in range(3)] + [replace(DONE, id="req_1")]
    assert bench.store.mark_interactive(marks) == 3
    assert [state(bench, f"req_{n}") for n in range(3)] == [
        InteractiveState.RUNNING,
        InteractiveState.DONE,
        InteractiveState.RUNNING,
    ]
    assert bench.store.mark_interactive([]) == 0


def test_a_moved_request_takes_nothing_from_its_former_holder(bench: Bench) -> None:
    bench.store.add_interactive(NEW)
    bench.store.mark_interactive([RUNNING])
    assert bench.store.reroute_interactive("req_1", 1, "gpu-1", "boot-9") == 2
    stored = bench.store.interactive(TENANT, "req_1")
    assert (stored.instance, stored.boot_id, stored.epoch) == ("gpu-1", "boot-9", 2)
    assert stored.state is InteractiveState.SENT
    assert bench.store.mark_interactive([DONE]) == 0
    assert bench.store.reroute_interactive("req_1", 1, "gpu-2", "boot-1") is None
    assert bench.store.mark_interactive([replace(DONE, epoch=2)]) == 1


def test_a_request_whose_boot_is_gone_and_nobody_moved_fails(bench: Bench) -> None:
    bench.beat(boot="boot-1")
    bench.store.add_interactive(NEW)
    bench.harness.advance(GRACE + 10)
    bench.beat(boot="boot-1")
    assert bench.store.sweep_interactive(GRACE) == 0
    bench.beat(boot="boot-2")
    assert bench.store.sweep_interactive(GRACE) == 1
    stored = bench.store.interactive(TENANT, "req_1")
    assert (stored.state, stored.status_code) == (InteractiveState.FAILED, 500)
    assert stored.result is not None and "instance_lost" in stored.result
    assert bench.store.sweep_interactive(GRACE) == 0


def test_a_request_is_given_time_to_be_moved_before_it_is_swept(bench: Bench) -> None:
    bench.beat(boot="boot-1")
    bench.store.add_interactive(NEW)
    bench.beat(boot="boot-2")
    assert bench.store.sweep_interactive(GRACE) == 0
    bench.harness.advance(GRACE + 1)
    assert bench.store.sweep_interactive(GRACE) == 1


def test_a_silent_and_a_retired_boot_are_gone(bench: Bench) -> None:
    bench.beat("gpu-0", "boot-1")
    bench.beat("gpu-1", "boot-1")
    bench.store.add_interactive(NEW)
    bench.store.add_interactive(replace(NEW, id="req_2", instance="gpu-1"))
    bench.store.retire("gpu-1", "boot-1")
    bench.harness.advance(GRACE + 1)
    assert bench.store.sweep_interactive(GRACE) == 1
    assert state(bench, "req_2") is InteractiveState.FAILED
    bench.harness.advance(GRACE)
    assert bench.store.sweep_interactive(GRACE) == 1


def test_a_request_that_nobody_sends_ends_although_its_boot_is_there(bench: Bench) -> None:
    bench.beat(boot="boot-1")
    bench.store.add_interactive(NEW)
    bench.store.add_interactive(replace(NEW, id="req_2"))
    bench.store.mark_interactive([replace(RUNNING, id="req_2")])
    bench.harness.advance(UNSENT_GRACES * GRACE + 1)
    bench.beat(boot="boot-1")
    assert bench.store.sweep_interactive(GRACE) == 1
    assert state(bench, "req_1") is InteractiveState.FAILED
    assert state(bench, "req_2") is InteractiveState.RUNNING


def test_an_instance_tells_what_it_does_to_batch_work(bench: Bench) -> None:
    told = Latency(SloClass.INTERACTIVE).after(0.25, 1.25, 5)
    bench.beat(
        interactive_running=2,
        batch_cap=30,
        evictions=5,
        recomputed_tokens=70,
        output_tokens=900,
        kv_usage=0.5,
        latencies=(told,),
    )
    (view,) = bench.store.instances()
    assert (view.interactive_running, view.batch_cap) == (2, 30)
    assert (view.evictions, view.recomputed_tokens) == (5, 70)
    assert (view.output_tokens, view.kv_usage) == (900, 0.5)
    assert view.latencies == (told,)


def test_how_requests_fared_is_told_of_those_answered_lately(bench: Bench) -> None:
    assert bench.store.timeliness(60).requests == 0
    for number, first_s in enumerate((0.1, 0.2, 0.9)):
        new = replace(NEW, id=f"req_{number}")
        bench.store.add_interactive(new)
        bench.store.mark_interactive(
            [replace(DONE, id=new.id, first_token_s=first_s, duration_s=first_s + 0.6)]
        )
    bench.store.add_interactive(replace(NEW, id="req_open"))
    told = bench.store.timeliness(60)
    assert told.requests == 3
    assert told.ttft_p50 == pytest.approx(0.2)
    assert told.ttft_p95 == pytest.approx(0.83)
    assert told.tpot_p50 == pytest.approx(0.1)
    assert told.met == pytest.approx(2 / 3)
    bench.harness.advance(61)
    assert bench.store.timeliness(60).requests == 0


def test_a_model_counts_as_served_for_a_while_after_its_instance_has_left(bench: Bench) -> None:
    assert not bench.store.served_lately(MODEL, 100)
    bench.beat(boot="boot-1")
    bench.store.retire("gpu-0", "boot-1")
    assert bench.store.served_lately(MODEL, 100)
    assert not any(bench.store.served_lately(name, 100) for name in ("another", "", "a\0", "\\"))
    bench.harness.advance(101)
    assert not bench.store.served_lately(MODEL, 100)


def test_bodies_are_emptied_first_and_rows_dropped_later(bench: Bench) -> None:
    bench.store.add_interactive(NEW)
    bench.store.add_interactive(replace(NEW, id="req_open"))
    bench.store.mark_interactive([DONE])
    assert bench.store.forget_interactive(100, 1000) == 0
    bench.harness.advance(101)
    assert bench.store.forget_interactive(100, 1000) == 1
    stored = bench.store.interactive(TENANT, "req_1")
    assert (stored.body, stored.result, stored.usage.output_tokens) == (None, None, 7)
    assert bench.store.forget_interactive(100, 1000) == 0
    bench.harness.advance(1000)
    assert bench.store.forget_interactive(100, 1000) == 1
    with pytest.raises(NotFound):
        bench.store.interactive(TENANT, "req_1")
    assert bench.store.interactive(TENANT, "req_open").body == '{"n":1}'
