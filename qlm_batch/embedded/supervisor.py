"""Keeps a set of processes running, and ends them in order."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qlm_batch.domain.errors import ConfigurationError
from qlm_batch.embedded.process import ManagedProcess, ProcessSpec

EXIT_CONFIGURATION = 78
"""A child that ends with this status cannot work as configured; restarting would not help."""

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 15.0
_STEADY_S = 60.0
_MOST_QUICK_ENDS = 8


@dataclass(slots=True)
class _Watched:
    process: ManagedProcess
    started_at: float
    quick_ends: int = 0
    restart_at: float | None = None


class Supervisor:
    """Runs children, restarts those that end, with growing pauses.

    `on_event(name, text)` is told of every end and restart. A child that ends with
    EXIT_CONFIGURATION, or again and again without ever running steadily, ends `watch` with a
    ConfigurationError that carries the end of its log.
    """

    def __init__(
        self, specs: Sequence[ProcessSpec], on_event: Callable[[str, str], None] = lambda *_: None
    ) -> None:
        self._specs = tuple(specs)
        self._on_event = on_event
        self._watched: list[_Watched] = []

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of running children by name."""
        return {
            child.process.spec.name: child.process.pid
            for child in self._watched
            if child.process.pid is not None and child.process.alive()
        }

    def start(self) -> None:
        """Start all children."""
        for spec in self._specs:
            process = ManagedProcess(spec)
            process.start()
            self._watched.append(_Watched(process, time.monotonic()))

    def check(self) -> None:
        """Look at every child once; restart what ended when its pause is over."""
        now = time.monotonic()
        for child in self._watched:
            name = child.process.spec.name
            if child.restart_at is not None:
                if now >= child.restart_at:
                    child.process.start()
                    child.started_at, child.restart_at = now, None
                    self._on_event(name, "restarted")
                continue
            status = child.process.poll()
            if status is None:
                continue
            if status == EXIT_CONFIGURATION:
                raise ConfigurationError(f"{name} cannot start:\n{child.process.log_tail(8)}")
            child.quick_ends = 0 if now - child.started_at > _STEADY_S else child.quick_ends + 1
            if child.quick_ends >= _MOST_QUICK_ENDS:
                raise ConfigurationError(
                    f"{name} ended {child.quick_ends} times in a row:\n{child.process.log_tail()}"
                )
            pause = min(_FIRST_WAIT_S * 2 ** max(0, child.quick_ends - 1), _LONGEST_WAIT_S)
            child.restart_at = now + pause
            self._on_event(name, f"ended with status {status}; restarting in {pause:.1f} s")

    def watch(self, stop: threading.Event) -> None:
        """Keep everything running until `stop` is set."""
        while not stop.wait(0.2):
            self.check()

    def stop(self) -> None:
        """End all children, last started first; those of one moment end together."""
        for child in self._watched:
            child.process.signal(child.process.spec.stop_signals[0])
        for child in reversed(self._watched):
            child.process.wait(child.process.spec.stop_wait_s)
            child.process.stop()
        self._watched.clear()
