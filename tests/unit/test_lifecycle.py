"""The shared service loop: idle waits, outages, crashes and the orderly stop."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest
from structlog.testing import capture_logs

from qlm_batch.control.clock import SystemClock
from qlm_batch.control.lifecycle import LoopConfig, run_services, stop_on_signals
from qlm_batch.domain.errors import Conflict, Unavailable


class FakeClock:
    """A clock whose sleeps are recorded and take no time."""

    def __init__(self) -> None:
        self.time = 0.0
        self.sleeps: list[float] = []

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.time += seconds


class Scripted:
    """A service that plays a list of results and exceptions, then stops the process."""

    name = "scripted"
    idle_s = 7.0

    def __init__(self, stop: threading.Event, script: list[object]) -> None:
        self.stop = stop
        self.script = script
        self.closed = 0

    def run_once(self) -> object:
        if not self.script:
            self.stop.set()
            return True
        step = self.script.pop(0)
        if isinstance(step, Exception):
            raise step
        return step

    def close(self) -> None:
        self.closed += 1


def play(script: list[object], **config: float) -> tuple[int, FakeClock, Scripted]:
    stop, clock = threading.Event(), FakeClock()
    service = Scripted(stop, script)
    status = run_services([service], clock, stop, LoopConfig(**config))  # type: ignore[arg-type]
    return status, clock, service


def test_it_waits_only_after_a_pass_that_found_nothing() -> None:
    status, clock, service = play([True, False, True])
    assert status == 0
    assert clock.sleeps == [7.0]
    assert service.closed == 1


def test_an_outage_is_logged_once_and_backed_off() -> None:
    away = [Unavailable("database away", why="connection refused") for _ in range(5)]
    with capture_logs() as logs:
        status, clock, _ = play([*away, True])
    assert status == 0
    assert clock.sleeps == [0.5, 1.0, 2.0, 4.0, 5.0]
    assert [entry["event"] for entry in logs] == ["dependency_away", "dependency_back"]
    assert "connection refused" in logs[0]["error"]


def test_a_second_outage_is_logged_again_and_starts_from_the_shortest_wait() -> None:
    with capture_logs() as logs:
        _, clock, _ = play([Unavailable("a"), True, Unavailable("b")])
    assert clock.sleeps == [0.5, 0.5]
    assert [e["event"] for e in logs].count("dependency_away") == 2


def test_an_expected_error_is_logged_and_never_ends_the_process() -> None:
    with capture_logs() as logs:
        status, _, _ = play([Conflict("no") for _ in range(5)], max_crashes=2)
    assert status == 0
    assert [entry["error"] for entry in logs] == ["no"] * 5


def test_crashes_are_logged_with_a_traceback_and_survived() -> None:
    with capture_logs() as logs:
        status, _, _ = play([ValueError("x"), True, ValueError("y"), True], max_crashes=2)
    assert status == 0
    assert [(e["event"], e["exc_info"]) for e in logs] == [("pass_crashed", True)] * 2


def test_too_many_crashes_in_a_row_stop_every_service_with_a_failure_status() -> None:
    stop = threading.Event()
    clock = FakeClock()
    broken = Scripted(stop, [ValueError("x")] * 3)
    waits = Waits(stop)
    with capture_logs():
        status = run_services([broken, waits], clock, stop, LoopConfig(max_crashes=3))
    assert status == 1
    assert broken.closed == waits.closed == 1


class Waits:
    """A service that does nothing until it is stopped."""

    name = "waits"
    idle_s = 60.0

    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop
        self.closed = 0

    def run_once(self) -> object:
        self.stop.wait(30)
        return False

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def restore_handlers() -> Iterator[None]:
    saved: list[tuple[signal.Signals, Callable[..., object] | int | None]] = [
        (number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)
    ]
    yield
    for number, handler in saved:
        signal.signal(number, handler)  # type: ignore[arg-type]


@pytest.mark.usefixtures("restore_handlers")
def test_sigterm_interrupts_an_idle_wait_and_ends_in_good_order() -> None:
    stop = threading.Event()
    stop_on_signals(stop)

    class Idle(Scripted):
        idle_s = 600.0

        def run_once(self) -> object:
            os.kill(os.getpid(), signal.SIGTERM)
            return False

    service = Idle(stop, [])
    assert run_services([service], SystemClock(stop), stop) == 0
    assert service.closed == 1
