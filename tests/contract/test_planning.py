"""Leadership, plans, the fleet, and keys."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qlm_batch.domain.buckets import prompt_mix
from qlm_batch.domain.errors import NotFound, NotLeader, Unauthenticated
from qlm_batch.domain.jobs import ApiKey, BatchState, EngineKind, Estimate, SliceState, SloClass
from qlm_batch.domain.snapshot import (
    Assignment,
    Decision,
    GroupPart,
    InstanceState,
    Observation,
    Output,
    Plan,
    PlannedGroup,
    Profile,
    RequestGroup,
    VirtualQueue,
)
from tests.contract.harness import LEASE, MODEL, TENANT, TERM, Bench, answer, held, lines_of


def test_a_standby_takes_over_only_after_the_term(bench: Bench) -> None:
    first = bench.store.lead("a", TERM)
    assert first is not None
    assert bench.store.lead("a", TERM) == first
    assert bench.store.lead("b", TERM) is None
    bench.harness.advance(TERM + 1)
    second = bench.store.lead("b", TERM)
    assert second is not None
    assert second > first
    assert bench.store.lead("a", TERM) is None


def test_who_resigns_is_followed_at_once(bench: Bench) -> None:
    first = bench.store.lead("a", TERM)
    bench.store.resign("b")
    assert bench.store.lead("b", TERM) is None
    bench.store.resign("a")
    second = bench.store.lead("b", TERM)
    assert first is not None
    assert second is not None
    assert second > first


def test_an_old_leader_writes_nothing(bench: Bench) -> None:
    batch = bench.batch(lines=4, slice_requests=2)
    bench.beat()
    old = bench.lead("a")
    bench.harness.advance(TERM + 1)
    bench.lead("b")
    (run,) = bench.store.snapshot().runs
    for write in (
        lambda: bench.store.save_plan(old, _plan(batch.id), [Decision("planned", 1.0)]),
        lambda: bench.store.assign(old, [Assignment("gpu-0", run.run_id, 1, 1, "g")]),
        lambda: bench.store.unassign(old, "gpu-0"),
        lambda: bench.store.take_observations(old),
        lambda: bench.store.keep_forecasts(old, {batch.id: {"mean_s": 1.0}}),
        lambda: bench.store.save_profiles(old, [Profile(MODEL, "cpu", {})]),
        lambda: bench.store.fail_unservable(old, MODEL, "no"),
    ):
        with pytest.raises(NotLeader):
            write()
    snapshot = bench.store.snapshot()
    assert (snapshot.runs, snapshot.queues, snapshot.profiles) == ((run,), (), ())


def _plan(*batches: str, keys: tuple[str, ...] = ("g",), p50: float = 5.0) -> Plan:
    groups = tuple(
        PlannedGroup(
            RequestGroup(key, MODEL, EngineKind.GENERATE, SloClass.BATCH, TENANT, 9.0, 1.0,
                         (GroupPart(1, 1, 2),), batches, 4, 40, 80),
            1.0, 2.0, 0.1, f"because {key}",
        )
        for key in keys
    )  # fmt: skip
    estimates = {name: Estimate(p50, 6.0, 0.1, "steady", 1.0) for name in batches}
    return Plan(1.0, "qlm", (VirtualQueue("gpu-0", groups),), estimates=estimates)


def test_a_batch_is_finishing_from_its_last_result_until_its_files_are_written(
    bench: Bench,
) -> None:
    batch = bench.batch(lines=1)
    assert bench.store.snapshot().finishing == frozenset()
    bench.serve()
    assert bench.store.snapshot().finishing == {batch.id}
    bench.export(batch.id)
    assert bench.store.snapshot().finishing == frozenset()


def test_a_plan_replaces_the_one_before_and_the_first_promise_stands(bench: Bench) -> None:
    batch = bench.batch()
    epoch = bench.lead()
    assert bench.store.snapshot().unpromised == {batch.id}
    bench.store.save_plan(epoch, _plan(batch.id, keys=("x", "y", "z")), [])
    bench.store.save_plan(epoch, _plan(batch.id, keys=("y", "z"), p50=7.0), [])
    assert [(q.position, q.group_key, q.reason) for q in bench.store.queues()] == [
        (0, "y", "because y"),
        (1, "z", "because z"),
    ]
    now = bench.get(batch.id)
    assert now.estimate is not None
    assert now.promise is not None
    assert (now.estimate.p50, now.promise.p50) == (7.0, 5.0)
    assert bench.store.snapshot().unpromised == frozenset()


def test_what_was_foreseen_of_a_batch_is_kept_until_it_ends_or_is_run_again(bench: Bench) -> None:
    batch, unplanned = bench.batch(lines=1), bench.batch(lines=1)
    epoch = bench.lead()
    told = {"model": MODEL, "made_at": 1.25, "told": {"mean_s": 0.1, "informed": True}}
    assert bench.store.forecasts() == {}
    bench.store.save_plan(epoch, _plan(batch.id), [])
    bench.store.keep_forecasts(epoch, {batch.id: told, unplanned.id: told, "batch_gone": told})
    bench.store.save_plan(epoch, _plan(batch.id, p50=7.0), [])
    assert bench.store.forecasts() == {batch.id: told}
    for part in bench.take():
        bench.finish(part, ok=False)
    assert bench.store.forecasts() == {batch.id: told}
    bench.export(batch.id)
    assert bench.store.forecasts() == {}
    bench.store.retry_batch(TENANT, batch.id)
    assert bench.store.forecasts() == {}


def test_decisions_are_kept_in_order(bench: Bench) -> None:
    batch = bench.batch()
    epoch = bench.lead()
    made = [Decision("moved", float(n), batch.id, detail={"n": n}) for n in range(3)]
    bench.store.save_plan(epoch, _plan(batch.id), made[:2])
    bench.store.save_plan(epoch, _plan(batch.id), made[2:])
    assert [d.detail["n"] for d in bench.store.decisions(TENANT, batch.id)] == [0, 1, 2]
    assert len(bench.store.decisions(TENANT, batch.id, limit=1)) == 1


def test_assignments_are_counted_shown_and_taken_back(bench: Bench) -> None:
    bench.batch(lines=6, slice_requests=2)
    bench.beat()
    assert bench.assign(most=2) == 2
    snapshot = bench.store.snapshot()
    (run,), (instance,) = snapshot.runs, snapshot.instances
    assert (run.slices, run.requests, run.prompt_tokens, run.max_tokens) == (1, 2, 20, 40)
    (work,) = instance.assigned
    assert (work.slices, work.leased_slices, work.requests, work.max_tokens) == (2, 0, 4, 80)
    assert len(bench.claim(most=1)) == 1
    assert bench.store.instances()[0].assigned[0].leased_slices == 1
    assert bench.store.unassign(bench.epoch, "gpu-0") == 1
    assert bench.store.snapshot().runs[0].slices == 2
    assert bench.assign(most=9) == 2


def test_nothing_is_assigned_to_an_instance_nobody_knows(bench: Bench) -> None:
    bench.batch()
    assert bench.assign("gpu-unknown") == 0


def test_observations_are_drained_once_and_in_order(bench: Bench) -> None:
    calls = ((1.5, 0.5, TENANT, 7, 5), (2.5, 20.0, TENANT, 8, 6))
    seen = tuple(
        Observation(
            *("gpu-0", "cpu", MODEL, float(n)),
            *((Output(TENANT, n, 9, cut=n == 1),), ((1, 2, 3, 0.5),)),
            calls=calls[:n],
        )
        for n in range(3)
    )
    bench.beat(observations=seen)
    epoch = bench.lead()
    assert tuple(bench.store.take_observations(epoch, limit=2)) == seen[:2]
    assert tuple(bench.store.take_observations(epoch)) == seen[2:]
    assert tuple(bench.store.take_observations(epoch)) == ()


def test_a_report_of_a_worker_that_does_not_tell_what_was_cut_is_taken(bench: Bench) -> None:
    ended: Any = (TENANT, 7, 9)
    bench.beat(observations=(Observation("gpu-0", "cpu", MODEL, 1.0, (ended,)),))
    (seen,) = bench.store.take_observations(bench.lead())
    assert [Output(*told) for told in seen.outputs] == [Output(TENANT, 7, 9, cut=False)]


def test_profiles_are_remembered(bench: Bench) -> None:
    epoch = bench.lead()
    bench.store.save_profiles(epoch, [Profile(MODEL, "cpu", {"a": 1})])
    bench.store.save_profiles(epoch, [Profile(MODEL, "cpu", {"a": [2.5]})])
    assert bench.store.snapshot().profiles == (Profile(MODEL, "cpu", {"a": [2.5]}),)


def test_work_of_a_model_nobody_serves_fails_with_an_http_error(bench: Bench) -> None:
    batch = bench.batch(lines=5, slice_requests=2)
    epoch = bench.lead()
    assert bench.store.fail_unservable(epoch, "other", "no") == 0
    assert bench.store.fail_unservable(epoch, MODEL, "no such model", limit=2) == 2
    assert bench.get(batch.id).state is BatchState.IN_PROGRESS
    assert bench.store.fail_unservable(epoch, MODEL, "no such model") == 1
    assert bench.get(batch.id).state is BatchState.FINALIZING
    lines = bench.lines(batch.id)
    assert {(line.status_code, line.ok) for line in lines} == {(404, False)}
    error = json.loads(lines[0].body or "")["error"]
    assert (error["code"], error["message"]) == ("model_not_found", "no such model")


def test_a_silent_instance_appears_as_lost_and_what_it_was_assigned_is_requeued(
    bench: Bench,
) -> None:
    bench.batch()
    bench.beat()
    bench.assign()
    bench.harness.advance(16)
    assert [i.state for i in bench.store.instances()] == [InstanceState.LOST]
    bench.store.reap(bench.lead())
    assert {s.state for s in bench.harness.slices()} == {SliceState.QUEUED}


def test_the_first_beat_of_a_new_boot_requeues_what_the_old_one_held(bench: Bench) -> None:
    bench.batch(lines=4, slice_requests=2)
    bench.beat()
    bench.assign()
    bench.claim(most=1)
    assert bench.beat(boot="boot-2")
    assert {s.state for s in bench.harness.slices()} == {SliceState.QUEUED}
    assert not bench.beat(boot="boot-1")
    assert bench.beat(boot="boot-2")


def test_a_retired_instance_holds_nothing_and_is_not_listed(bench: Bench) -> None:
    bench.batch(lines=4, slice_requests=2)
    bench.beat()
    bench.assign()
    bench.claim(most=1)
    bench.store.retire("gpu-0", "boot-0")
    assert len(bench.store.instances()) == 1
    bench.store.retire("gpu-0", "boot-1")
    assert list(bench.store.instances()) == []
    assert {(s.state, s.attempts) for s in bench.harness.slices()} == {(SliceState.QUEUED, 0)}


def test_a_boot_that_died_is_lost_at_once_and_what_it_held_is_queued_again(bench: Bench) -> None:
    bench.batch(lines=6, slice_requests=2)
    bench.beat()
    bench.assign()
    fruitful, _ = bench.claim(most=4)
    first = answer(fruitful, fruitful.requests[0])
    bench.store.flush("gpu-0", [first], [held(fruitful)], lease_s=LEASE)
    bench.store.died("gpu-0", "boot-1")
    assert [view.state for view in bench.store.instances()] == [InstanceState.LOST]
    # As after a lost lease: one that brought nothing counts as an attempt.
    assert [(s.state, s.attempts) for s in bench.harness.slices()] == [
        (SliceState.QUEUED, 0),
        (SliceState.QUEUED, 1),
        (SliceState.QUEUED, 0),
    ]
    late = answer(fruitful, fruitful.requests[1])
    assert bench.store.flush("gpu-0", [late], [], lease_s=None).written == 1


def test_a_boot_that_died_does_not_come_back_and_gets_nothing(bench: Bench) -> None:
    bench.batch()
    bench.beat()
    bench.store.died("gpu-0", "boot-1")
    assert bench.assign() == 0
    assert not bench.beat()
    assert [view.state for view in bench.store.instances()] == [InstanceState.LOST]
    assert bench.take(boot="boot-2")
    assert not bench.claim(boot="boot-1")


def test_the_death_of_an_older_boot_is_none_of_the_next_ones(bench: Bench) -> None:
    bench.batch()
    bench.beat()
    bench.take(boot="boot-2")
    bench.store.died("gpu-0", "boot-1")
    bench.store.died("gpu-9", "boot-1")
    assert [view.state for view in bench.store.instances()] == [InstanceState.READY]
    assert {s.state for s in bench.harness.slices()} == {SliceState.LEASED}


def test_the_death_of_a_boot_that_retired_changes_nothing(bench: Bench) -> None:
    bench.beat()
    bench.store.retire("gpu-0", "boot-1")
    bench.store.died("gpu-0", "boot-1")
    assert list(bench.store.instances()) == []


def test_a_key_is_known_by_its_hash_only_until_it_is_revoked(bench: Bench) -> None:
    key = ApiKey("key_1", TENANT, "laptop", "user", "sk-qlm-ab", bench.store.now())
    bench.store.add_key(key, "sk-qlm-abcdef")
    assert bench.store.key_for("sk-qlm-abcdef") == key
    assert "sk-qlm-abcdef" not in bench.harness.everything()
    with pytest.raises(Unauthenticated):
        bench.store.key_for("sk-qlm-abcdeg")
    assert bench.store.revoke_key("key_1").revoked_at is not None
    with pytest.raises(Unauthenticated):
        bench.store.key_for("sk-qlm-abcdef")
    assert [k.id for k in bench.store.list_keys(TENANT)] == ["key_1"]
    assert list(bench.store.list_keys("other")) == []
    with pytest.raises(NotFound):
        bench.store.revoke_key("key_9")


def test_a_webhook_secret_outlives_its_successor_by_a_day(bench: Bench) -> None:
    bench.store.add_key(ApiKey("key_1", TENANT, "n", "user", "p", 0.0), "s")
    (first,) = bench.store.webhook_secrets(TENANT)
    assert first.startswith("whsec_")
    second = bench.store.rotate_webhook_secret(TENANT)
    assert list(bench.store.webhook_secrets(TENANT)) == [second, first]
    bench.harness.advance(86_401)
    assert list(bench.store.webhook_secrets(TENANT)) == [second]


def test_a_requests_story_says_where_it_is_and_what_came_of_it(bench: Bench) -> None:
    batch = bench.batch(lines=4, slice_requests=2)
    name = lines_of(4)[3].custom_id
    waiting = bench.store.request_story(TENANT, batch.id, name)
    assert (waiting.line, waiting.state, waiting.outcome) == (4, SliceState.QUEUED, None)
    bench.beat()
    bench.store.save_plan(
        bench.lead(),
        _plan(batch.id),
        [
            Decision("planned", 1.0, batch.id, "999.1.0", "gpu-0", {"reason": "first"}),
            Decision("promised", 1.0, batch.id),
        ],
    )
    bench.serve()
    done = bench.store.request_story(TENANT, batch.id, name)
    assert (done.state, done.instance, done.generation) == (SliceState.DONE, "gpu-0", 1)
    assert [made.kind for made in done.decisions] == ["planned", "promised"]
    assert done.outcome is not None and done.outcome.ok and done.outcome.body is None


def test_the_story_of_a_request_that_is_not_there_is_not_found(bench: Bench) -> None:
    batch = bench.batch(lines=2)
    with pytest.raises(NotFound, match="no line with the custom_id 'nobody'"):
        bench.store.request_story(TENANT, batch.id, "nobody")
    with pytest.raises(NotFound):
        bench.store.request_story("another", batch.id, lines_of(2)[0].custom_id)


def test_what_estimates_are_made_from_reaches_the_snapshot(bench: Bench) -> None:
    bench.batch(lines=5, slice_requests=2)
    bench.beat(interactive_share=0.25)
    seen = bench.store.snapshot()
    mix = prompt_mix([10] * 5)
    assert seen.instances[0].interactive_share == 0.25
    assert seen.runs[0].prompts == mix
    bench.assign()
    assert bench.store.snapshot().instances[0].assigned[0].prompts == mix
