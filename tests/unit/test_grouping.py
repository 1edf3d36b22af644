"""Request groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from qlm_batch.domain.snapshot import QueueEntry, RequestGroup, RunView, Snapshot
from qlm_batch.scheduling.grouping import MAX_GROUPS, ModelCapacity, form_groups
from tests.unit.planning_cases import DAY, run_view, snapshot

CAPACITY = {"m": ModelCapacity(running_batch=32.0, request_s=0.01)}


def groups_of(
    runs: Sequence[RunView],
    before: Sequence[RequestGroup] = (),
    *,
    now: float = 0.0,
    capacity: dict[str, ModelCapacity] = CAPACITY,
) -> tuple[RequestGroup, ...]:
    queues = tuple(QueueEntry("i", n, g.key, g.slices, "") for n, g in enumerate(before))
    return form_groups(Snapshot(now, tuple(runs), (), queues), capacity)


runs = st.lists(
    st.builds(
        run_view,
        st.integers(1, 10**6),
        st.integers(1, 400),
        requests=st.integers(1, 30_000),
        deadline=st.floats(-10.0, 2 * DAY),
        model=st.sampled_from(["m", "n"]),
        tenant=st.sampled_from(["t", "u"]),
    ),
    max_size=20,
    unique_by=lambda run: run.run_id,
)


@given(runs)
@settings(deadline=None)
def test_every_queued_slice_is_in_exactly_one_group(queue: list[RunView]) -> None:
    groups = groups_of(queue)
    placed: Counter[int] = Counter()
    for group in groups:
        for part in group.parts:
            placed[part.run_id] += part.slices
    assert placed == Counter({run.run_id: run.slices for run in queue})
    assert sum(g.requests for g in groups) == sum(r.requests for r in queue)
    assert sum(g.prompt_tokens for g in groups) == sum(r.prompt_tokens for r in queue)
    assert sum(g.max_tokens for g in groups) == sum(r.max_tokens for r in queue)
    assert len({g.key for g in groups}) == len(groups)


@given(runs)
@settings(deadline=None)
def test_a_group_never_mixes_models_or_tenants(queue: list[RunView]) -> None:
    by_id = {run.run_id: run for run in queue}
    for group in groups_of(queue):
        for part in group.parts:
            run = by_id[part.run_id]
            assert (run.model, run.tenant) == (group.model, group.tenant)
            assert run.deadline >= group.deadline


@given(runs, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_groups_do_not_depend_on_the_order_of_runs(queue, shuffler) -> None:  # type: ignore[no-untyped-def]
    shuffled = list(queue)
    shuffler.shuffle(shuffled)
    assert groups_of(queue) == groups_of(shuffled)


def test_a_group_near_the_head_holds_four_running_batches() -> None:
    groups = groups_of([run_view(1, 100)])
    assert [group.requests for group in groups[:4]] == [4 * 32] * 4


def test_a_group_takes_no_more_than_a_quarter_of_the_time_left() -> None:
    slow = {"m": ModelCapacity(running_batch=1000.0, request_s=0.1)}
    groups = groups_of([run_view(1, 100, deadline=256.0)], capacity=slow)
    assert max(group.requests for group in groups[:4]) * 0.1 <= 64.0


def test_a_group_is_at_least_one_slice() -> None:
    tight = {"m": ModelCapacity(running_batch=1.0, request_s=10.0)}
    groups = groups_of([run_view(1, 5, deadline=1.0)], capacity=tight)
    assert {group.slices for group in groups} == {1}


def test_small_batches_share_a_group() -> None:
    queue = [run_view(n, 1, requests=4, deadline=DAY + n) for n in range(1, 21)]
    (only,) = groups_of(queue)
    assert len(only.batches) == 20


def test_batches_with_distant_deadlines_do_not_share_a_group() -> None:
    groups = groups_of([run_view(1, 1, deadline=600.0), run_view(2, 1, deadline=DAY)])
    assert [group.batches for group in groups] == [("batch-1",), ("batch-2",)]


def test_the_groups_of_a_run_come_in_the_order_it_is_worked_off() -> None:
    groups = groups_of([run_view(1, 64)])
    behind = [int(group.key.rpartition(".")[2]) for group in groups]
    assert behind == sorted(behind, reverse=True)


def test_keys_last_while_a_run_is_worked_off() -> None:
    before = groups_of([run_view(1, 200)])
    after = groups_of([run_view(1, 199)], before)
    assert {g.key for g in after} - {g.key for g in before} == set()
    halfway = groups_of([run_view(1, 100)], after)
    assert halfway[-1].key == before[-1].key


def test_an_arrival_joins_a_group_with_room_and_renames_none() -> None:
    queue = [run_view(n, 1, requests=60, deadline=DAY + n) for n in range(1, 4)]
    before = groups_of(queue)
    late = run_view(9, 1, requests=10, deadline=DAY + 9)
    after = groups_of([*queue, late], before)
    assert [g.key for g in after] == [g.key for g in before]
    assert "batch-9" in after[-1].batches


def test_an_arrival_does_not_join_a_group_that_is_full() -> None:
    queue = [run_view(n, 1, requests=60, deadline=DAY + n) for n in range(1, 3)]
    before = groups_of(queue)
    after = groups_of([*queue, run_view(9, 1, requests=10, deadline=DAY + 9)], before)
    assert [g.batches for g in after] == [("batch-1", "batch-2"), ("batch-9",)]
    assert after[0].key == before[0].key


def test_the_last_members_of_a_group_keep_its_name_when_the_first_are_gone() -> None:
    queue = [run_view(n, 1, requests=30, deadline=DAY + n) for n in range(1, 9)]
    before = groups_of(queue)
    after = groups_of(queue[1:], before)
    assert [g.key for g in after] == [g.key for g in before]


def test_a_million_queued_requests_make_a_few_hundred_groups() -> None:
    groups = groups_of([run_view(1, 15_625)])
    assert sum(g.slices for g in groups) == 15_625
    assert len(groups) < 500


def test_the_tokens_of_a_billion_requests_are_shared_out_in_full() -> None:
    count = 10**9
    queue = snapshot(runs=[run_view(1, count // 64, requests=count, max_tokens=1000)])
    groups = form_groups(queue, {"m": ModelCapacity(32.0, 0.1)})
    assert sum(group.max_tokens for group in groups) == 1000 * count
    assert {round(group.max_tokens / group.requests) for group in groups} == {1000}


def test_a_fleet_gets_enough_groups_to_share_one_long_run_evenly() -> None:
    fleet = {"m": ModelCapacity(32.0, 0.01, instances=100)}
    groups = groups_of([run_view(1, 15_625)], capacity=fleet)
    assert 400 <= len(groups) <= MAX_GROUPS
    assert max(g.slices for g in groups) <= 15_625 / 100


def test_many_long_runs_stay_below_the_bound() -> None:
    fleet = {"m": ModelCapacity(1.0, 0.01, instances=50)}
    queue = [run_view(n, 400) for n in range(1, 51)]
    assert len(groups_of(queue, capacity=fleet)) <= MAX_GROUPS


def test_runs_with_nothing_queued_make_no_group() -> None:
    empty = replace(run_view(1, 1), slices=0, requests=0)
    assert form_groups(snapshot(runs=[empty]), CAPACITY) == ()


def test_a_group_has_the_prompts_of_its_runs() -> None:
    queue = [
        replace(run_view(n, 1, requests=4, deadline=DAY + n), prompts=((n, 3), (9, 1)))
        for n in (1, 2)
    ]
    (only,) = groups_of(queue)
    assert only.prompts == ((1, 3), (2, 3), (9, 2))
    (unknown,) = groups_of([queue[0], replace(queue[1], prompts=())])
    assert unknown.prompts == ()
