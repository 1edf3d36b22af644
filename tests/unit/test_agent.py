"""The agent's rules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlm_batch.scheduling import agent


@given(in_hand=st.integers(0, 10_000), slots=st.integers(1, 1024))
def test_a_pull_never_brings_more_than_two_running_batches(in_hand: int, slots: int) -> None:
    pulled = agent.pull_size(in_hand, slots)
    assert pulled >= 0
    assert pulled == 0 or in_hand + pulled <= 2 * slots


@given(slots=st.integers(1, 1024))
def test_an_engine_about_to_run_dry_is_topped_up(slots: int) -> None:
    assert agent.pull_size(slots, slots) > 0
    assert agent.pull_size(2 * slots, slots) == 0


def test_nothing_joins_a_suspect_slice() -> None:
    assert agent.pull_size(0, 32, suspect=True) == 0


def test_an_engine_without_slots_pulls_nothing() -> None:
    assert agent.pull_size(0, 0) == 0


@given(slots=st.integers(1, 4096))
def test_the_cap_keeps_every_slot_busy_with_a_little_to_spare(slots: int) -> None:
    assert slots < agent.concurrency_cap(slots) <= slots + max(1, slots // 4)


@given(a=st.floats(0, 4e9), b=st.floats(0, 4e9))
def test_an_earlier_deadline_never_runs_after_a_later_one(a: float, b: float) -> None:
    first, second = sorted((a, b))
    assert agent.engine_priority(first) <= agent.engine_priority(second)


def test_batch_work_is_always_behind_interactive_work() -> None:
    assert agent.engine_priority(0.0) > agent.INTERACTIVE_PRIORITY


@pytest.mark.parametrize(
    ("status", "again"),
    [(200, False), (400, False), (404, False), (429, True), (500, True), (503, True)],
)
def test_only_faults_that_may_pass_are_tried_again(status: int, again: bool) -> None:
    assert agent.worth_retrying(status) is again


def test_retries_end() -> None:
    delays = [agent.retry_delay(n) for n in range(1, 10)]
    assert delays[0] is not None
    assert delays[-1] is None


def test_batch_work_runs_as_if_alone_while_nobody_waits_for_tokens() -> None:
    full = agent.concurrency_cap(32)
    assert agent.batch_cap(8, 32, step_s=9.0, target_s=0.1, quiet=True) == full
    assert agent.batch_cap(8, 32, step_s=None, target_s=0.1, quiet=False) == full


def test_slow_steps_lower_the_cap_until_they_fit_and_never_starve_batch_work() -> None:
    cap = agent.concurrency_cap(32)
    for _ in range(100):
        # Each sequence costs 5 ms of a step.
        cap = agent.batch_cap(cap, 32, step_s=0.005 * cap, target_s=0.1, quiet=False)
    assert 0.08 <= 0.005 * cap <= 0.1
    for _ in range(100):
        cap = agent.batch_cap(cap, 32, step_s=9.0, target_s=0.1, quiet=False)
    assert cap == 8


def test_quick_steps_raise_the_cap_again() -> None:
    cap = 8
    for _ in range(100):
        cap = agent.batch_cap(cap, 32, step_s=0.001, target_s=0.1, quiet=False)
    assert cap == agent.concurrency_cap(32)


@given(st.floats(0, 4e9), st.floats(0, 4e9), st.floats(0, 4e9))
def test_a_call_is_ahead_of_any_batch_work_and_of_calls_due_later(
    due: float, later: float, deadline: float
) -> None:
    due, later = sorted((due, later))
    assert agent.interactive_priority(due) < agent.engine_priority(deadline)
    assert agent.interactive_priority(due) <= agent.interactive_priority(later)


def test_the_share_of_interactive_work_follows_what_is_inside_and_fades() -> None:
    share = 0.0
    for _ in range(300):
        share = agent.interactive_share(share, 8, 32, 2.0)
    assert share == pytest.approx(0.25, abs=0.01)
    for _ in range(30):
        share = agent.interactive_share(share, 0, 32, 2.0)
    assert share == pytest.approx(0.25 / 2.718, abs=0.02)
    assert agent.interactive_share(1.0, 99, 32, 1e6) == 1.0
