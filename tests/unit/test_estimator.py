"""The waiting-time estimator."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlm_batch.domain.buckets import prompt_mix
from qlm_batch.domain.jobs import EngineKind
from qlm_batch.domain.snapshot import (
    InstanceState,
    Observation,
    Output,
    Profile,
    Residency,
    Snapshot,
)
from qlm_batch.scheduling.estimator import Estimator
from qlm_batch.scheduling.flows import Flow, few
from qlm_batch.scheduling.grouping import form_groups
from qlm_batch.scheduling.policies import policy
from qlm_batch.scheduling.profile import Knowledge, fold
from qlm_batch.scheduling.promises import ends_of, with_estimates
from tests.unit.planning_cases import assigned, group, instance, run_view, snapshot, work_of

STEP_S = 0.02


def learned(length: int = 100) -> tuple[Profile, ...]:
    """A device with steps of 20 ms whatever is in them, and outputs of one length."""
    return fold(
        (),
        [
            Observation(
                "i",
                "A100",
                "m",
                0.0,
                (Output("t", length, 9),) * 2000,
                ((32, 8000, 0, STEP_S),) * 2000,
            )
        ],
    )


def known(situation: Snapshot) -> Estimator:
    return Estimator(replace(situation, profiles=learned()))


def flow(estimator: Estimator, prompt: float = 100.0, cap: float = 1000.0) -> Flow:
    return estimator.flow(0, "m", EngineKind.GENERATE, "t", prompt, cap)


def test_throughput_is_the_running_batch_over_the_step_time() -> None:
    found = flow(known(snapshot(instances=[instance("i")])))
    assert found.running == 32
    assert found.tokens_per_s == pytest.approx(32 / STEP_S, rel=0.25)


def test_key_value_memory_limits_the_running_batch() -> None:
    small = instance("i", kv_tokens=1500)
    assert flow(known(snapshot(instances=[small]))).running < 12


def test_a_limit_on_output_tokens_makes_requests_short() -> None:
    estimator = known(snapshot(instances=[instance("i")]))
    assert flow(estimator, cap=10).request_s < 0.2 * flow(estimator).request_s


def test_measured_throughput_stands_in_for_steps() -> None:
    seen = Observation("i", "A100", "m", 0.0, (Output("t", 100, 9),) * 2000, (), 64_000, 640, 100.0)
    situation = replace(snapshot(instances=[instance("i")]), profiles=fold((), [seen]))
    assert flow(Estimator(situation)).tokens_per_s == pytest.approx(640, rel=0.01)


def test_interactive_work_served_first_slows_batch_work() -> None:
    alone = known(snapshot(instances=[instance("i")]))
    shared = known(snapshot(instances=[replace(instance("i"), interactive_share=0.5)]))
    asked = group("g", deadline=100.0, requests=100)
    assert work_of(shared, asked).mean[0] == pytest.approx(2 * work_of(alone, asked).mean[0])


def test_twice_the_requests_take_twice_the_time_and_less_than_twice_the_spread() -> None:
    estimator = Estimator(snapshot(instances=[instance("i")]))
    one = work_of(estimator, group("g", deadline=100.0, requests=100))
    two = work_of(estimator, group("h", deadline=100.0, requests=200))
    assert two.mean[0] == pytest.approx(2 * one.mean[0])
    assert two.var[0] ** 0.5 == pytest.approx(2**0.5 * one.var[0] ** 0.5)


def test_a_lone_request_takes_its_whole_length() -> None:
    estimator = known(snapshot(instances=[instance("i")]))
    work = work_of(estimator, replace(group("g", deadline=100.0), max_tokens=4000))
    length = flow(estimator, cap=4000).lengths.mean
    assert work.mean[0] + work.tail[0] == pytest.approx(
        length * flow(estimator, cap=4000).step_s, rel=0.05
    )


@given(
    st.lists(
        st.tuples(
            st.sampled_from("mn"),
            st.sampled_from("tu"),
            st.integers(1, 500),
            st.integers(1, 2000),
            st.integers(1, 4000),
        ),
        max_size=12,
    )
)
@settings(max_examples=30, deadline=None)
def test_many_groups_at_once_take_what_each_takes_by_itself(
    asked: list[tuple[str, str, int, int, int]],
) -> None:
    seen = [
        Observation("i", "A100", model, 0.0, (Output("t", 90, 9), Output("u", 700, 9)) * 50)
        for model in "mn"
    ]
    fleet = [
        instance("i", ("m", "n")),
        replace(instance("j", ("n",), device="A10", slots=8), interactive_share=0.5),
    ]
    estimator = Estimator(replace(snapshot(instances=fleet), profiles=fold((), seen)))
    groups = [
        replace(
            group(f"g{n}", deadline=9.0, model=model, requests=requests),
            tenant=tenant,
            prompt_tokens=requests * prompt,
            max_tokens=requests * limit,
        )
        for n, (model, tenant, requests, prompt, limit) in enumerate(asked)
    ]
    table = estimator.table(groups)
    for g, one in enumerate(groups):
        for i, slow in enumerate((1.0, 2.0)):
            if estimator.serves(i, one.model):
                alone, kind, count = estimator.flow_of(i, one), table.kind[g], table.count[g]
                last = few(min(one.requests, math.ceil(alone.running)))
                tail = table.tail(np.array([g]), np.array([i]))[0]
                assert count * table.mean[kind, i] == pytest.approx(
                    one.requests * alone.request_s * slow
                )
                assert table.var[kind, i] == pytest.approx(alone.request_var * slow**2)
                assert tail == pytest.approx(alone.tail_s(last) * slow, rel=1e-6, abs=1e-9)


def test_an_instance_that_does_not_host_a_model_would_take_for_ever() -> None:
    fleet = [instance("i", ["other"]), instance("j")]
    work = work_of(Estimator(snapshot(instances=fleet)), group("g", deadline=100.0))
    assert work.mean[0] == float("inf")
    assert work.mean[1] < float("inf")


@pytest.mark.parametrize("state", [InstanceState.LOST, InstanceState.DRAINING])
def test_an_instance_on_its_way_out_takes_nothing(state: InstanceState) -> None:
    assert not Estimator(snapshot(instances=[instance("i", state=state)])).serves(0, "m")


def test_what_runs_already_counts_only_with_its_rest() -> None:
    held = (assigned(1, 32, leased=1),)
    fresh = known(snapshot(instances=[instance("i", assigned=held)]))
    nearly = known(snapshot(instances=[instance("i", assigned=held, generated=(90,) * 32)]))
    assert nearly.ready(0).mean < 0.5 * fresh.ready(0).mean


def test_running_interactive_requests_are_none_of_the_work_an_instance_was_assigned() -> None:
    held = (assigned(1, 32, leased=1),)
    waiting = known(snapshot(instances=[instance("i", assigned=held)]))
    beside = replace(
        instance("i", assigned=held, generated=(90,) * 32), running=32, interactive_running=32
    )
    assert known(snapshot(instances=[beside])).ready(0).mean == waiting.ready(0).mean


def test_a_measured_wake_is_believed() -> None:
    views = {"m": Residency.AWAKE, "n": Residency.ASLEEP}
    assert Estimator(snapshot(instances=[instance("i", views, wake_s=2.5)])).swap_s(0, "n") == 2.5


def test_an_unmeasured_cold_start_takes_longer_than_a_wake() -> None:
    views = {"n": Residency.ASLEEP, "o": Residency.COLD}
    estimator = Estimator(snapshot(instances=[instance("i", views)]))
    assert estimator.swap_s(0, "o") > estimator.swap_s(0, "n")


def test_quantiles_are_ordered_and_never_negative() -> None:
    estimator = Estimator(snapshot())
    levels = [estimator.quantile(1.0, 4.0, level) for level in (0.01, 0.5, 0.9, 0.99)]
    assert levels == sorted(levels)
    assert levels[0] == 0.0


def test_the_model_error_does_not_average_out() -> None:
    estimator = Estimator(snapshot())
    assert estimator.spread(1000.0, 0.0) == pytest.approx(100.0)


def planned(situation: Snapshot) -> Snapshot:
    return replace(situation, profiles=learned())


def estimate_of(situation: Snapshot, batch_id: str):  # type: ignore[no-untyped-def]
    estimator = Estimator(situation)
    groups = form_groups(situation, estimator.capacities(situation))
    plan = policy("qlm").plan(situation, groups, estimator, 20, 0)
    return with_estimates(plan, ends_of(plan, situation, estimator)).estimates[batch_id]


def test_a_batch_is_told_when_it_will_be_done() -> None:
    situation = planned(snapshot(runs=[run_view(1, 10)], instances=[instance("i")], now=1000.0))
    found = estimate_of(situation, "batch-1")
    assert found.p50 == pytest.approx(1000.0 + 640 * 100 * STEP_S / 32, rel=0.35)
    assert found.p95 > found.p50
    assert found.miss_probability < 0.01
    assert "on i" in found.reason and "model m awake" in found.reason


def test_work_without_a_bound_is_not_promised_as_the_one_token_answers_before_it() -> None:
    steps = ((32, 8000, 0, STEP_S),) * 50
    before = fold((), [Observation("i", "A100", "m", 0.0, (), steps)])
    cut = (Output("t", 1, 9, cut=True),) * 50
    after = fold(before, [Observation("i", "A100", "m", 1.0, cut)])
    unbounded = run_view(1, 8, requests=500, max_tokens=500 * 8000)
    situation = snapshot(runs=[unbounded], instances=[instance("i")])
    first, now = (
        estimate_of(replace(situation, profiles=profiles), "batch-1")
        for profiles in (before, after)
    )
    assert now.p50 == pytest.approx(first.p50, rel=0.05)
    assert now.p95 >= 0.95 * first.p95


def test_a_batch_that_cannot_be_on_time_is_told_so() -> None:
    situation = planned(snapshot(runs=[run_view(1, 100, deadline=5.0)], instances=[instance("i")]))
    found = estimate_of(situation, "batch-1")
    assert found.miss_probability > 0.99
    assert "let go" in found.reason


def test_a_batch_whose_model_is_served_nowhere_has_a_reason_and_no_time() -> None:
    situation = planned(snapshot(runs=[run_view(1, 1, model="x")], instances=[instance("i")]))
    found = estimate_of(situation, "batch-1")
    assert (found.p50, found.p95, found.miss_probability) == (None, None, None)
    assert found.reason == "no instance serves model x"


def test_a_batch_that_is_all_assigned_is_told_when_it_will_be_done() -> None:
    holding = instance("i", assigned=(assigned(1, 64, leased=1),))
    found = estimate_of(planned(snapshot(instances=[holding])), "batch-1")
    assert found.p50 is not None and found.p50 > 0.0
    assert "running on i" in found.reason


def test_a_batch_s_own_groups_are_no_work_ahead_of_it() -> None:
    first, second = run_view(1, 200, deadline=3600.0), run_view(2, 200, deadline=7200.0)
    situation = planned(snapshot(runs=[first, second], instances=[instance("i")]))
    groups = form_groups(situation, Estimator(situation).capacities(situation))
    ahead = sum(group.batches == ("batch-1",) for group in groups)
    assert min(ahead, len(groups) - ahead) > 1
    assert estimate_of(situation, "batch-1").reason.startswith("next on i;")
    assert estimate_of(situation, "batch-2").reason.startswith(f"starts after {ahead} groups on i;")


def test_waiting_behind_others_takes_longer() -> None:
    first = run_view(1, 20, deadline=3600.0)
    second = run_view(2, 20, deadline=7200.0)
    alone = estimate_of(planned(snapshot(runs=[second], instances=[instance("i")])), "batch-2")
    behind = estimate_of(
        planned(snapshot(runs=[first, second], instances=[instance("i")])), "batch-2"
    )
    assert behind.p50 > 1.7 * alone.p50


def test_work_whose_prompts_brought_long_answers_takes_longer() -> None:
    seen = Observation("i", "A100", "m", 0.0, (Output("t", 40, 100), Output("t", 400, 2000)) * 200)
    situation = replace(snapshot(instances=[instance("i")]), profiles=fold((), [seen]))
    estimator = Estimator(situation)
    asked = replace(group("g", deadline=1e6, requests=100), max_tokens=100 * 4096)
    short, long = (
        work_of(estimator, replace(asked, prompts=prompt_mix([tokens]))).mean[0]
        for tokens in (100, 2000)
    )
    assert long > 5 * short
    usual = work_of(estimator, asked).mean[0]
    assert usual == pytest.approx((short + long) / 2, rel=0.1)


def test_prompts_never_lift_an_expectation_above_the_limit() -> None:
    seen = Observation("i", "A100", "m", 0.0, (Output("t", 10, 100), Output("t", 400, 2000)) * 200)
    situation = replace(snapshot(instances=[instance("i")]), profiles=fold((), [seen]))
    asked = replace(group("g", deadline=1e6, requests=10), prompts=prompt_mix([2000]))
    limited = replace(asked, max_tokens=10 * 100)
    assert Estimator(situation).expected_tokens(limited) <= 10 * 105


def test_what_an_instance_holds_ends_one_after_the_other_by_deadline() -> None:
    held = (assigned(1, 64, deadline=500.0), assigned(2, 64, deadline=100.0))
    situation = snapshot(instances=[instance("i", assigned=held)])
    plan = policy("edf").plan(situation, (), known(situation), 0, 0)
    told = with_estimates(plan, ends_of(plan, situation, known(situation))).estimates
    sooner, later = (told[f"batch-{n}"].p50 for n in (2, 1))
    assert sooner is not None and later is not None
    assert sooner < 0.75 * later


def test_batches_of_one_group_end_one_after_the_other() -> None:
    runs = [run_view(n, 1, requests=60, deadline=86_400.0, batch_id=f"b{n}") for n in (1, 2, 3)]
    situation = planned(snapshot(runs=runs, instances=[instance("i", slots=8)]))
    ends = [estimate_of(situation, f"b{n}").p50 for n in (1, 2, 3)]
    assert ends[0] < 0.5 * ends[2]
    assert ends == sorted(ends)


def test_where_all_runs_at_once_steps_are_shorter_than_those_of_a_full_instance() -> None:
    steps = tuple((n, 300 * n, 0, 0.01 + 0.001 * n) for n in range(1, 65)) * 30
    seen = Observation("i", "A100", "m", 0.0, (Output("t", 100, 9),) * 2000, steps)
    fleet = [instance("i", slots=64)]
    few, many = (
        replace(
            snapshot(runs=[run_view(1, 1, requests=n)], instances=fleet), profiles=fold((), [seen])
        )
        for n in (4, 64)
    )
    assert estimate_of(few, "batch-1").p50 < 0.5 * estimate_of(many, "batch-1").p50


def test_before_a_model_was_seen_promises_are_wide() -> None:
    fresh = snapshot(runs=[run_view(1, 50)], instances=[instance("i")])
    wide, narrow = (estimate_of(situation, "batch-1") for situation in (fresh, planned(fresh)))
    assert wide.p95 > 3.0 * wide.p50
    assert narrow.p95 < 1.5 * narrow.p50


def test_what_was_worked_out_is_taken_over_until_something_is_learned_or_reported() -> None:
    seen = snapshot(instances=[instance("i", generated=(5, 9))])
    told = Knowledge.of(learned())
    first = Estimator(seen, knowledge=told)
    later = replace(seen, now=seen.now + 1.0)
    assert Estimator(later, knowledge=told, before=first).basis is first.basis
    aged = replace(seen, instances=(instance("i", generated=(50, 90)),))
    assert Estimator(aged, knowledge=told, before=first).basis is not first.basis
    more = told.observed([Observation("i", "A100", "m", 2.0, (Output("t", 42, 9),))])
    assert Estimator(seen, knowledge=more, before=first).basis is not first.basis


def test_an_estimator_says_the_same_with_and_without_one_before_it() -> None:
    told, asked = Knowledge.of(learned()), group("g", deadline=1e6, requests=640)
    seen = snapshot(instances=[instance("i", generated=(5, 9)), instance("j")])
    before = Estimator(seen, knowledge=told)
    work_of(before, asked)
    later = replace(seen, now=seen.now + 1.0)
    fresh = work_of(Estimator(later, knowledge=told), asked)
    carried = work_of(Estimator(later, knowledge=told, before=before), asked)
    assert (fresh.mean == carried.mean).all() and (fresh.tail == carried.tail).all()


def test_profiles_that_did_not_change_are_not_read_again() -> None:
    told = Knowledge.of(learned())
    assert Knowledge.of(learned(), told) is told
    assert Knowledge.of((), told) is not told
