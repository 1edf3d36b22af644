"""Virtual time and the order of what happens at once."""

from __future__ import annotations

import math

import pytest

from qlm_batch.simulation.events import EventQueue


def _told(queue: EventQueue, *events: tuple[float, int, str]) -> list[str]:
    told: list[str] = []
    for time, priority, name in events:
        queue.at(time, lambda name=name: told.append(name), priority)  # type: ignore[misc]
    queue.run(math.inf)
    return told


def test_events_happen_by_time_then_priority_then_in_the_order_they_were_scheduled() -> None:
    told = _told(
        EventQueue(), (2.0, 0, "d"), (1.0, 1, "b"), (1.0, 1, "c"), (1.0, 0, "a"), (2.0, 0, "e")
    )
    assert told == ["a", "b", "c", "d", "e"]


def test_an_event_scheduled_for_now_happens_after_those_already_due() -> None:
    queue, told = EventQueue(), []

    def first() -> None:
        told.append("first")
        queue.after(0.0, lambda: told.append("third"))

    queue.at(1.0, first)
    queue.at(1.0, lambda: told.append("second"))
    queue.run(1.0)
    assert told == ["first", "second", "third"]


def test_time_only_goes_forward() -> None:
    queue = EventQueue(5.0)
    with pytest.raises(ValueError, match="cannot be scheduled"):
        queue.at(4.0, lambda: None)
    with pytest.raises(ValueError, match="cannot be scheduled"):
        queue.at(math.nan, lambda: None)


def test_sleeping_runs_what_falls_due_meanwhile() -> None:
    queue, told = EventQueue(10.0), []
    queue.after(1.0, lambda: told.append(queue.now()))
    queue.after(3.0, lambda: told.append(queue.now()))
    queue.sleep(2.0)
    assert told == [11.0]
    assert queue.now() == 12.0
    assert len(queue) == 1
