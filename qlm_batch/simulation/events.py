"""Virtual time: events in a total order, and the clock they turn."""

from __future__ import annotations

import heapq
from collections.abc import Callable

Action = Callable[[], None]


class EventQueue:
    """Actions by (time, priority, order of scheduling), lowest first; equal runs are equal.

    It is a Clock whose `sleep` runs what falls due meanwhile. Times are virtual seconds.
    """

    def __init__(self, start: float = 0.0) -> None:
        self._now = start
        self._sequence = 0
        self._events: list[tuple[float, int, int, Action]] = []

    def __len__(self) -> int:
        return len(self._events)

    def now(self) -> float:
        """The virtual time."""
        return self._now

    def at(self, time: float, action: Action, priority: int = 0) -> None:
        """Run `action` at `time`. ValueError when that has passed or is not a number."""
        if not time >= self._now:
            raise ValueError(f"an event at {time} cannot be scheduled at {self._now}")
        heapq.heappush(self._events, (time, priority, self._sequence, action))
        self._sequence += 1

    def after(self, seconds: float, action: Action, priority: int = 0) -> None:
        """Run `action` in so many seconds."""
        self.at(self._now + seconds, action, priority)

    def step(self) -> bool:
        """Run the next action; False when there is none."""
        if not self._events:
            return False
        self._now, _, _, action = heapq.heappop(self._events)
        action()
        return True

    def run(self, until: float) -> None:
        """Run all that is due up to and including `until`, which is the time afterwards."""
        while self._events and self._events[0][0] <= until:
            self.step()
        self._now = max(self._now, until)

    def sleep(self, seconds: float) -> None:
        """Let so much time pass."""
        self.run(self._now + max(0.0, seconds))
