"""Predictions that are kept until they are over."""

from __future__ import annotations

from dataclasses import replace

from qlm_batch.domain.jobs import Estimate, SloClass
from qlm_batch.domain.snapshot import Plan, PlannedGroup, Snapshot, VirtualQueue
from qlm_batch.scheduling.forecasts import LEAST_S, Forecasts
from qlm_batch.scheduling.profile import Knowledge
from tests.unit.planning_cases import assigned, group, instance, run_view, snapshot

RUN = run_view(1, 4, batch_id="b")


def queue(now: float, *, left: bool = True) -> Snapshot:
    seen = snapshot(runs=[RUN] if left else [], instances=[instance("i")], now=now)
    return replace(seen, unpromised=frozenset({"b"}))


def plan(now: float, *, wait_s: float = 20.0, end_s: float = 60.0, shed: bool = False) -> Plan:
    placed = PlannedGroup(
        group("g", deadline=1e6), now + wait_s, now + end_s, 1.0, "next", shed=shed
    )
    estimates = {"b": Estimate(now + end_s, now + 2 * end_s, 0.0, "next", now)}
    return Plan(now, "qlm", (VirtualQueue("i", (placed,)),), estimates=estimates)


def test_a_wait_is_scored_once_when_its_first_work_is_handed_out() -> None:
    forecasts = Forecasts().planned(plan(0.0), queue(0.0))
    forecasts = forecasts.planned(plan(5.0, wait_s=1.0), queue(5.0)).started(["g"], 30.0)
    assert forecasts.outcomes == (("m", SloClass.BATCH, 20.0, 30.0, False),)
    assert forecasts.told().started(["g"], 40.0).outcomes == ()


def test_neither_what_was_let_go_nor_what_starts_at_once_is_scored() -> None:
    gone = Forecasts().planned(plan(0.0, shed=True), queue(0.0))
    at_once = Forecasts().planned(plan(0.0, wait_s=LEAST_S / 2), queue(0.0))
    assert gone.started(["g"], 9.0).outcomes == at_once.started(["g"], 9.0).outcomes == ()


def test_a_batch_is_scored_from_its_promise_to_its_end() -> None:
    forecasts = Forecasts().planned(plan(0.0), queue(0.0)).planned(plan(50.0, end_s=9.0), queue(50))
    assert forecasts.seen(queue(55.0)).outcomes == ()
    own = replace(assigned(1, 3), batch_id="b")
    held = snapshot(instances=[instance("i", assigned=(own,))], now=58.0)
    assert forecasts.seen(held).outcomes == ()
    ended = forecasts.seen(queue(61.0, left=False))
    assert ended.outcomes == (("m", SloClass.BATCH, 60.0, 61.0, True),)
    assert ended.told().seen(queue(62.0, left=False)).outcomes == ()


def test_a_batch_taken_away_long_before_its_end_is_not_scored() -> None:
    forecasts = Forecasts().planned(plan(0.0), queue(0.0))
    assert forecasts.seen(queue(20.0, left=False)).outcomes == ()


def test_ends_count_for_promises_where_enough_were_seen() -> None:
    waits = [("m", SloClass.BATCH, 10.0, 11.0, False)] * 30
    ends = [("m", SloClass.BATCH, 10.0, 14.0, True)] * 30
    known = Knowledge().waited(waits)
    assert known.calibration("m").factor(SloClass.BATCH) == 1.1
    known = known.waited(ends)
    assert known.calibration("m").factor(SloClass.BATCH) == 1.4
    assert Knowledge.of(known.profiles()).calibration("m") == known.calibration("m")
