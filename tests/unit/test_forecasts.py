"""Promises that are remembered until they are over."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from qlm_batch.domain.snapshot import Snapshot
from qlm_batch.scheduling.calibration import Foreseen
from qlm_batch.scheduling.forecasts import LEAST_S, Forecasts
from qlm_batch.scheduling.promises import End
from tests.unit.planning_cases import assigned, instance, run_view, snapshot

RUN = run_view(1, 4, batch_id="b")
ERROR = 0.5


def queue(now: float, *, left: bool = True) -> Snapshot:
    seen = snapshot(runs=[RUN] if left else [], instances=[instance("i")], now=now)
    return replace(seen, unpromised=frozenset({"b"}))


def ends(seconds: float = 60.0) -> dict[str, End]:
    return {"b": End("m", Foreseen(seconds, ERROR, seconds, 2.0 * seconds), 0.0, "next")}


def promised(seconds: float = 60.0) -> Forecasts:
    return Forecasts().planned(ends(seconds), queue(0.0))


def test_a_batch_is_scored_from_its_promise_to_its_end() -> None:
    forecasts = promised().planned(ends(9.0), queue(50.0))
    assert forecasts.seen(queue(55.0)).outcomes == ()
    own = replace(assigned(1, 3), batch_id="b")
    held = snapshot(instances=[instance("i", assigned=(own,))], now=58.0)
    assert forecasts.seen(held).outcomes == ()
    written = replace(queue(62.0, left=False), finishing=frozenset({"b"}))
    assert forecasts.seen(written).outcomes == ()
    ended = forecasts.seen(queue(66.0, left=False))
    ((model, found),) = ended.outcomes
    assert (model, found) == ("m", pytest.approx(math.log(66.0 / 60.0) / ERROR))
    assert ended.learned().seen(queue(67.0, left=False)).outcomes == ()


def test_what_is_kept_of_a_promise_is_scored_as_the_promise_is() -> None:
    first = promised()
    again = Forecasts.resumed(json.loads(json.dumps(first.fresh)))
    for later in (first, again):
        assert later.overdue(240.0) == first.overdue(240.0) != {}
        ((_, found),) = later.seen(queue(66.0, left=False)).outcomes
        assert found == pytest.approx(math.log(66.0 / 60.0) / ERROR)
    assert not first.kept().fresh
    assert not again.planned(ends(9.0), queue(50.0)).fresh


@pytest.mark.parametrize("data", [{}, {"model": "m", "made_at": 1.0, "told": {"old": 1.0}}])
def test_what_a_release_of_another_shape_kept_says_nothing(data: dict[str, object]) -> None:
    assert Forecasts.resumed({"b": data}) == Forecasts()


def test_a_batch_taken_away_long_before_its_end_is_not_scored() -> None:
    assert promised().seen(queue(20.0, left=False)).outcomes == ()


def test_what_is_done_at_once_is_not_scored() -> None:
    assert promised(LEAST_S / 2).seen(queue(30.0, left=False)).outcomes == ()


def test_what_is_later_than_its_bound_counts_before_it_ends() -> None:
    forecasts = promised()
    assert forecasts.overdue(119.0) == {}
    (found,) = forecasts.overdue(240.0)["m"]
    assert found == pytest.approx(math.log(4.0) / ERROR, abs=0.1)
    assert forecasts.seen(queue(250.0, left=False)).overdue(250.0) == {}
