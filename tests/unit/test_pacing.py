"""How what an instance is handed follows what it turns out to need."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from qlm_batch.domain.snapshot import Assignment, RunView
from qlm_batch.scheduling.pacing import MOST, PATIENCE_S, Pace
from tests.unit.planning_cases import assigned, instance, run_view, snapshot

QUEUED = (run_view(1, 1000),)


def after(
    pace: Pace, left: int, *, handed: int = 8, runs: Sequence[RunView] = QUEUED, now: float = 0.0
) -> Pace:
    """One pass over an instance that still has `left` slices and is handed more."""
    views = [instance("i", assigned=(assigned(9, left * 64, slices=left),) if left else ())]
    situation = snapshot(runs=list(runs), instances=views, now=now)
    return pace.seen(situation).handed(situation, [Assignment("i", 1, 1, handed, "g")])


def test_an_instance_that_runs_dry_is_handed_twice_as_much_each_time() -> None:
    pace = after(Pace(), 0)
    assert pace.factors == {}
    factors = []
    for _ in range(8):
        pace = after(pace, 0)
        factors.append(pace.factors["i"])
    assert factors == [2, 4, 8, 16, 32, MOST, MOST, MOST]


def test_an_instance_that_soon_runs_dry_is_handed_what_lasts_a_second_at_its_speed() -> None:
    pace = after(Pace(), 0, handed=80)
    assert pace.fresh == {"i"} and pace.hasty
    pace = after(pace, 10, handed=80, now=0.1)
    assert pace.factors == {"i": pytest.approx(70 / 0.1 / 80)}
    assert not pace.fresh and pace.hasty
    pace = after(pace, 30, handed=500, now=0.2)
    assert pace.factors == {"i": pytest.approx(70 / 0.1 / 80 * 60 / 0.1 / 90)}


def test_an_instance_with_enough_until_the_next_pass_keeps_its_pace() -> None:
    pace = after(Pace(), 0, handed=100)
    pace = after(pace, 50, handed=50, now=0.5)
    assert pace.factors == {}
    assert not pace.hasty


def test_an_instance_that_got_all_there_was_is_not_taken_for_fast() -> None:
    pace = after(Pace(), 0, handed=8, runs=[run_view(1, 8)])
    assert after(pace, 0).factors == {}


def test_an_instance_left_with_most_of_it_is_handed_less_again_after_a_while() -> None:
    pace = after(after(after(Pace(), 0), 0), 0)
    assert pace.factors == {"i": 4}
    pace = after(pace, 7, now=PATIENCE_S / 2)
    assert pace.factors == {"i": 4}
    pace = after(pace, 14, now=PATIENCE_S)
    assert pace.factors == {"i": 2}
    pace = after(pace, 21, now=1.5 * PATIENCE_S)
    assert pace.factors == {"i": 2}
    assert after(pace, 28, now=2 * PATIENCE_S).factors == {}


def test_the_pace_is_forgotten_when_the_queue_is_empty() -> None:
    pace = after(after(Pace(), 0), 0)
    assert pace.factors == {"i": 2}
    pace = after(pace, 1, handed=0, runs=[])
    assert after(pace, 0, handed=0, runs=[], now=PATIENCE_S).factors == {}
