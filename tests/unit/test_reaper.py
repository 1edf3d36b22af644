"""The reaper's patience."""

from __future__ import annotations

from contextlib import suppress

import pytest

from qlm_batch.control.leadership import Leadership
from qlm_batch.control.reaper import Reaper, ReaperConfig
from qlm_batch.domain.errors import NotLeader, Unavailable
from qlm_batch.domain.ledger import Reaped


class HandClock:
    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


class Database:
    """Counts reapings; `away` makes every call fail, `fenced` makes reaping fail."""

    def __init__(self) -> None:
        self.away = self.fenced = False
        self.reaped: list[int] = []

    def ping(self) -> None:
        if self.away:
            raise Unavailable("the database is away")

    def reap(self, epoch: int) -> Reaped:
        if self.fenced:
            raise NotLeader("another leads")
        self.reaped.append(epoch)
        return Reaped(requeued=1)


class Stage:
    def __init__(self) -> None:
        self.database, self.clock, self.leadership = Database(), HandClock(), Leadership()
        self.leadership.lead(7)
        config = ReaperConfig(lease_s=30.0, period_s=1.0, gap_s=5.0)
        self.reaper = Reaper(self.database, self.clock, self.leadership, config)

    def passes(self, seconds: int) -> None:
        for _ in range(seconds):
            with suppress(Unavailable):
                self.reaper.run_once()
            self.clock.sleep(1.0)


@pytest.fixture
def stage() -> Stage:
    return Stage()


def test_nothing_is_reaped_before_a_lease_term_without_a_gap(stage: Stage) -> None:
    stage.passes(30)
    assert stage.database.reaped == []
    stage.passes(2)
    assert stage.database.reaped == [7, 7]


def test_an_outage_starts_the_wait_again(stage: Stage) -> None:
    stage.passes(40)
    stage.database.away = True
    stage.passes(3)
    stage.database.away = False
    stage.database.reaped.clear()
    stage.passes(30)
    assert stage.database.reaped == []
    stage.passes(1)
    assert stage.database.reaped == [7]


def test_a_reaper_that_was_stopped_itself_waits_again(stage: Stage) -> None:
    stage.passes(40)
    stage.database.reaped.clear()
    stage.clock.sleep(60.0)
    stage.passes(30)
    assert stage.database.reaped == []


def test_a_standby_reaps_nothing(stage: Stage) -> None:
    stage.leadership.step_down()
    stage.passes(60)
    assert stage.database.reaped == []


def test_a_fenced_reaper_steps_down_quietly(stage: Stage) -> None:
    stage.database.fenced = True
    stage.passes(40)
    assert stage.leadership.epoch is None


def test_a_pass_that_changed_something_asks_for_the_next_at_once(stage: Stage) -> None:
    assert not stage.reaper.run_once()
    stage.passes(40)
    assert stage.reaper.run_once()
