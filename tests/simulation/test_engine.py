"""The engine model, against cases computed by hand and against its compiled twin."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlm_batch.scheduling.eviction import MAX_EVICTIONS, MOST_ALONE, URGENT_BELOW
from qlm_batch.scheduling.speed import StepTime
from qlm_batch.simulation.engine import EngineLimits, Finished, ReferenceEngine
from qlm_batch.simulation.fast_engine import FastEngine

Engine = ReferenceEngine | FastEngine
Make = Callable[[EngineLimits, StepTime], Engine]

ONE = StepTime(1.0, 0.0, 0.0, 0.0)
"""Every step lasts a second."""
BATCH = URGENT_BELOW + 100


@pytest.fixture(params=[ReferenceEngine, FastEngine])
def make(request: pytest.FixtureRequest) -> Make:
    made: Make = request.param
    return made


def _ends(engine: Engine, until: float = 1e6) -> dict[int, tuple[float, float]]:
    return {f.key: (f.first_token, f.end) for f in engine.advance(until)}


def test_the_step_that_ends_a_prompt_brings_the_first_token(make: Make) -> None:
    engine = make(EngineLimits(4, 1600), ONE)
    engine.submit(7, 10, 3, BATCH, 0.0)
    assert _ends(engine) == {7: (1.0, 3.0)}


def test_a_step_takes_as_long_as_its_sequences_context_and_prefill(make: Make) -> None:
    engine = make(EngineLimits(4, 1600), StepTime(1.0, 0.1, 0.01, 0.001))
    engine.submit(1, 10, 2, BATCH, 0.0)
    first = 1.0 + 0.1 + 0.001 * 10
    second = 1.0 + 0.1 + 0.01 * 10
    assert _ends(engine)[1] == pytest.approx((first, first + second))


def test_a_long_prompt_is_prefilled_in_chunks_beside_decodes(make: Make) -> None:
    engine = make(EngineLimits(4, 1600, batched_tokens=10), ONE)
    engine.submit(1, 5, 5, BATCH, 0.0)
    engine.submit(2, 20, 1, BATCH, 0.0)
    # Chunks of 5 beside the first prompt, then 9 beside one decode, then the last 6.
    assert _ends(engine) == {1: (1.0, 5.0), 2: (3.0, 3.0)}


def test_running_requests_come_before_waiting_ones(make: Make) -> None:
    engine = make(EngineLimits(1, 1600), ONE)
    engine.submit(1, 1, 3, BATCH + 1, 0.0)
    engine.advance(0.5)
    engine.submit(2, 1, 1, BATCH, 0.5)
    assert _ends(engine) == {1: (1.0, 3.0), 2: (4.0, 4.0)}


def test_waiting_requests_go_by_priority_then_arrival(make: Make) -> None:
    engine = make(EngineLimits(1, 1600), ONE)
    for key, priority, arrival in ((1, 5, 0.2), (2, 4, 0.9), (3, 5, 0.1), (4, 5, 0.2)):
        engine.submit(key, 1, 1, priority, arrival)
    assert [f.key for f in engine.advance(1e3)] == [2, 3, 1, 4]


def test_an_interactive_request_evicts_batch_work_and_the_victim_keeps_its_tokens(
    make: Make,
) -> None:
    engine = make(EngineLimits(1, 1600), ONE)
    engine.submit(1, 1, 4, BATCH, 0.0)
    engine.advance(1.5)
    engine.submit(2, 1, 2, 0, 1.5)
    # Two tokens are there at 2 s; they stay, so two more steps end it after the guest left at 4 s.
    assert _ends(engine) == {2: (3.0, 4.0), 1: (1.0, 6.0)}
    assert engine.preemptions == 1
    assert engine.recomputed == 0


def test_who_rests_runs_again_before_other_batch_work_begins(make: Make) -> None:
    engine = make(EngineLimits(1, 1600), ONE)
    engine.submit(1, 1, 4, BATCH + 1, 0.0)
    engine.advance(1.5)
    engine.submit(2, 1, 2, 0, 1.5)
    engine.submit(3, 1, 1, BATCH, 1.5)
    assert _ends(engine) == {2: (3.0, 4.0), 1: (1.0, 6.0), 3: (7.0, 7.0)}


def test_of_those_that_rest_the_first_due_runs_again_first(make: Make) -> None:
    engine = make(EngineLimits(2, 1600), ONE)
    engine.submit(1, 1, 4, BATCH + 1, 0.0)
    engine.submit(2, 1, 4, BATCH, 0.0)
    engine.advance(1.5)
    engine.submit(3, 1, 1, 0, 1.5)
    engine.submit(4, 1, 2, 0, 1.5)
    # Both rest from 2 s on; a place is free at 3 s, another at 4 s.
    ends = _ends(engine)
    assert (ends[3], ends[4]) == ((3.0, 3.0), (3.0, 4.0))
    assert (ends[2], ends[1]) == ((1.0, 5.0), (1.0, 6.0))


def test_who_rests_gives_its_blocks_to_those_that_grow(make: Make) -> None:
    engine = make(EngineLimits(1, 48), ONE)
    engine.submit(1, 15, 6, BATCH, 0.0)
    engine.advance(1.5)
    engine.submit(2, 15, 20, 0, 1.5)
    # At 2 s the victim rests with its one block; the guest wants its third when it has 33 tokens.
    assert _ends(engine) == {2: (3.0, 22.0), 1: (1.0, 26.0)}
    assert (engine.preemptions, engine.recomputed) == (1, 16)


def test_an_interactive_prompt_takes_a_kept_place_in_a_step_of_its_own(make: Make) -> None:
    engine = make(EngineLimits(1, 1600, headroom=1, alone=True), ONE)
    engine.submit(1, 1, 4, BATCH, 0.0)
    engine.advance(1.5)
    engine.submit(2, 1, 2, 0, 1.5)
    # The step from 2 s to 3 s is the guest's alone; both share the next.
    assert _ends(engine) == {2: (3.0, 4.0), 1: (1.0, 5.0)}
    assert engine.preemptions == 0


def test_a_burst_has_a_few_steps_for_itself_and_batch_work_the_next(make: Make) -> None:
    engine = make(EngineLimits(1, 1600, headroom=4, alone=True), ONE)
    engine.submit(1, 1, 4, BATCH, 0.0)
    done = []
    for guest in range(MOST_ALONE + 1):
        done += engine.advance(1.5 + guest)
        engine.submit(10 + guest, 1, 1, 0, 1.5 + guest)
    ends = {each.key: (each.first_token, each.end) for each in done} | _ends(engine)
    assert [ends[10 + guest] for guest in range(MOST_ALONE + 1)] == [
        (3.0 + guest, 3.0 + guest) for guest in range(MOST_ALONE + 1)
    ]
    # Two tokens before the guests, one in the step of the last of them, one after.
    assert ends[1] == (1.0, 4.0 + MOST_ALONE)


def test_a_burst_enters_in_groups_so_that_its_first_are_answered_sooner(make: Make) -> None:
    engine = make(EngineLimits(8, 1600, together=30), StepTime(0.0, 0.0, 0.0, 0.1))
    for guest in range(4):
        engine.submit(guest, 15, 1, 0, 0.0)
    assert _ends(engine) == {0: (3.0, 3.0), 1: (3.0, 3.0), 2: (6.0, 6.0), 3: (6.0, 6.0)}


def test_batch_work_gives_way_to_those_of_a_burst_that_enter(make: Make) -> None:
    engine = make(EngineLimits(4, 1600, together=30), ONE)
    for line in range(4):
        engine.submit(line, 1, 9, BATCH + line, 0.0)
    engine.advance(0.5)
    for guest in range(4, 7):
        engine.submit(guest, 15, 1, 0, 0.5)
    # From 1 s on two of them run, and two lines of the batch rest.
    engine.advance(1.5)
    assert engine.preemptions == 2


def test_nobody_is_evicted_without_end(make: Make) -> None:
    engine = make(EngineLimits(1, 1600), ONE)
    engine.submit(1, 1, 30, BATCH, 0.0)
    engine.advance(0.5)
    for guest in range(MAX_EVICTIONS + 1):
        engine.submit(10 + guest, 1, 1, 0, 2.0 * guest)
        engine.advance(2.0 * guest + 1.5)
    assert engine.preemptions == MAX_EVICTIONS


def test_batch_work_never_evicts(make: Make) -> None:
    engine = make(EngineLimits(1, 1600), ONE)
    engine.submit(1, 1, 4, BATCH, 0.0)
    engine.advance(0.5)
    engine.submit(2, 1, 1, BATCH - 1, 0.5)
    assert _ends(engine) == {1: (1.0, 4.0), 2: (5.0, 5.0)}
    assert engine.preemptions == 0


def test_a_request_is_admitted_only_when_its_whole_sequence_fits_in_blocks(make: Make) -> None:
    engine = make(EngineLimits(4, 48, block_tokens=16), ONE)
    engine.submit(1, 17, 2, BATCH, 0.0)
    engine.submit(2, 17, 1, BATCH, 0.1)
    # 17 tokens take two of three blocks.
    assert _ends(engine) == {1: (1.0, 2.0), 2: (3.0, 3.0)}


def test_the_latest_of_lowest_priority_gives_way_when_blocks_run_out(make: Make) -> None:
    engine = make(EngineLimits(4, 32, block_tokens=16), ONE)
    engine.submit(1, 15, 4, BATCH, 0.0)
    engine.submit(2, 15, 4, BATCH, 0.5)
    ended = _ends(engine)
    # At 2 s both have 17 tokens: the first takes the second's block, which starts over when it
    # ended at 4 s: its two tokens are kept, 17 are computed again, which brings the third.
    assert ended == {1: (1.0, 4.0), 2: (1.0, 6.0)}
    assert engine.preemptions == 1
    assert engine.recomputed == 16


@pytest.mark.parametrize(
    ("guest_tokens", "kept_blocks"),
    [(17, 2), (33, 1), (49, 0)],
    ids=["the unfinished block is reused", "two are reused", "all are reused"],
)
def test_whose_blocks_were_taken_computes_again_what_the_prefix_cache_lost(
    make: Make, guest_tokens: int, kept_blocks: int
) -> None:
    engine = make(EngineLimits(1, 64), ONE)
    engine.submit(1, 40, 4, BATCH, 0.0)
    engine.advance(1.5)
    # At 2 s the victim has 41 tokens in three of four blocks, two of them whole.
    engine.submit(2, guest_tokens, 1, 0, 1.5)
    assert _ends(engine) == {2: (3.0, 3.0), 1: (1.0, 5.0)}
    assert engine.preemptions == 1
    assert engine.recomputed == 41 - 16 * kept_blocks


def test_without_a_prefix_cache_all_tokens_are_computed_again(make: Make) -> None:
    engine = make(EngineLimits(1, 64, prefix_caching=False), StepTime(1.0, 0.0, 0.0, 0.01))
    engine.submit(1, 40, 4, BATCH, 0.0)
    engine.advance(1.5)
    engine.submit(2, 20, 1, 0, 1.5)
    # 1.4 s and a second, the guest's 1.2 s, then 42 tokens of the victim's and its last.
    assert _ends(engine)[1] == pytest.approx((1.4, 2.4 + 1.2 + 1.42 + 1.0))
    assert engine.recomputed == 41


def test_nothing_is_admitted_in_a_step_that_preempted(make: Make) -> None:
    engine = make(EngineLimits(4, 48, block_tokens=16), ONE)
    engine.submit(1, 16, 4, BATCH, 0.0)
    engine.submit(2, 30, 4, BATCH, 0.5)
    engine.advance(0.9)
    engine.submit(3, 1, 1, BATCH - 1, 0.9)
    # The second step preempts request 2 for a block of request 1, which leaves one free.
    assert _ends(engine)[3] == (3.0, 3.0)
    assert engine.preemptions == 1


def test_what_could_never_run_is_refused(make: Make) -> None:
    engine = make(EngineLimits(4, 32), ONE)
    with pytest.raises(ValueError, match="do not fit"):
        engine.submit(1, 30, 3, BATCH, 0.0)
    with pytest.raises(ValueError, match="1 is the least"):
        engine.submit(1, 0, 3, BATCH, 0.0)


def test_requests_that_come_together_are_treated_as_if_each_came_alone() -> None:
    limits = EngineLimits(4, 4000)
    alone, together = FastEngine(limits, ONE), FastEngine(limits, ONE)
    # More than there are rows for at first, some of which are free again by then.
    for now, first, count in ((0.0, 0, 30), (40.0, 30, 100)):
        keys = np.arange(first, first + count)
        prompts, outputs = 1 + keys * 7 % 50, 1 + keys * 5 % 30
        together.submit_all(keys, prompts, outputs, BATCH, now)
        for key, prompt, output in zip(keys, prompts, outputs, strict=True):
            alone.submit(int(key), int(prompt), int(output), BATCH, now)
        assert together.abort(first + 3) and alone.abort(first + 3)
        assert together.advance(now + 40.0) == alone.advance(now + 40.0)
    rest = together.advance(1e6)
    assert rest == alone.advance(1e6)
    assert rest


def test_of_requests_that_come_together_none_is_taken_where_one_could_never_run() -> None:
    engine = FastEngine(EngineLimits(4, 32), ONE)
    with pytest.raises(ValueError, match="30 prompt and 3 output tokens do not fit"):
        engine.submit_all(np.array([1, 2]), np.array([1, 30]), np.array([1, 3]), BATCH, 0.0)
    assert not engine.waiting


def test_an_aborted_request_leaves_its_place_to_others(make: Make) -> None:
    engine = make(EngineLimits(1, 1600), ONE)
    engine.submit(1, 1, 100, BATCH, 0.0)
    engine.submit(2, 1, 1, BATCH, 0.0)
    engine.submit(3, 1, 1, BATCH, 0.0)
    engine.advance(0.5)
    assert engine.abort(1) and engine.abort(2)
    assert not engine.abort(9)
    assert _ends(engine) == {3: (2.0, 2.0)}


def test_an_idle_engine_waits_for_its_next_request(make: Make) -> None:
    engine = make(EngineLimits(1, 1600), ONE)
    assert engine.advance(10.0) == []
    engine.submit(1, 1, 1, BATCH, 10.0)
    assert _ends(engine) == {1: (11.0, 11.0)}


@st.composite
def _loads(draw: st.DrawFn) -> tuple[EngineLimits, StepTime, list[tuple[int, ...]], list[float]]:
    limits = EngineLimits(
        slots=draw(st.integers(1, 6)),
        kv_tokens=draw(st.integers(16, 60)) * 8,
        batched_tokens=draw(st.integers(4, 64)),
        block_tokens=8,
        headroom=draw(st.integers(0, 2)),
        alone=draw(st.booleans()),
        together=draw(st.none() | st.integers(1, 120)),
        prefix_caching=draw(st.booleans()),
    )
    requests = draw(
        st.lists(
            st.tuples(
                st.integers(1, 60),
                st.integers(1, 60),
                st.sampled_from([0, BATCH, BATCH + 1]),
                st.integers(0, 4),
            ),
            min_size=1,
            max_size=14,
        )
    )
    waits = draw(st.lists(st.floats(0.013, 3.7), min_size=5, max_size=5))
    speed = StepTime(0.010137, 0.000713, 0.0000171, 0.00023)
    return limits, speed, requests, waits


@settings(max_examples=150, deadline=None)
@given(load=_loads())
def test_the_compiled_engine_does_what_the_readable_one_does(
    load: tuple[EngineLimits, StepTime, list[tuple[int, ...]], list[float]],
) -> None:
    limits, speed, requests, waits = load
    plain, fast = ReferenceEngine(limits, speed), FastEngine(limits, speed)
    ended: list[Finished] = []
    now = 0.0
    for turn, wait in enumerate((*waits, 1e5)):
        for key, (prompt, output, priority, at) in enumerate(requests):
            if at == turn:
                for engine in (plain, fast):
                    engine.submit(key, prompt, output, priority, now + key % 3)
        now += wait
        here, there = plain.advance(now), fast.advance(now)
        ended += here
        assert [f.key for f in here] == [f.key for f in there]
        for one, other in zip(here, there, strict=True):
            assert one.first_token == pytest.approx(other.first_token, rel=1e-9)
            assert one.end == pytest.approx(other.end, rel=1e-9)
        assert fast.clock == pytest.approx(plain.clock, rel=1e-9)
        assert (fast.steps, fast.generated) == (plain.steps, plain.generated)
        assert (fast.preemptions, fast.recomputed) == (plain.preemptions, plain.recomputed)
        assert (fast.running, fast.waiting) == (
            len(plain.running),
            len(plain.waiting) + len(plain.resting),
        )
        assert sorted(fast.ages(99)) == sorted(s.generated for s in plain.running)
    assert sorted(f.key for f in ended) == list(range(len(requests)))
