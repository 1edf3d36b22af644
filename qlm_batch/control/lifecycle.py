"""The one way background services are run, kept alive and stopped."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

import structlog

from qlm_batch.domain.errors import QlmError, Unavailable
from qlm_batch.domain.ports import Clock

log = structlog.get_logger(__name__)


class Service(Protocol):
    """A loop body. It keeps no state that a crash between two passes could lose."""

    @property
    def name(self) -> str:
        """What the log calls it; unique within a process."""
        ...

    @property
    def idle_s(self) -> float:
        """How long to wait after a pass that found nothing to do."""
        ...

    def run_once(self) -> object:
        """One pass; a truthy result asks for the next one at once."""
        ...

    def close(self) -> None:
        """Give back what is held; called once, after the last pass, on the same thread."""
        ...


@dataclass(frozen=True, slots=True)
class LoopConfig:
    """How a loop treats failure: waits double from `min_backoff_s` to `max_backoff_s`.

    `max_crashes` consecutive unexpected exceptions of one service end the process.
    """

    min_backoff_s: float = 0.5
    max_backoff_s: float = 5.0
    max_crashes: int = 10

    def backoff_s(self, failures: int) -> float:
        """The wait after the `failures`-th consecutive failure, counted from 1."""
        doublings = min(failures - 1, 30)
        return min(self.max_backoff_s, self.min_backoff_s * 2.0**doublings)


class ServiceLoop:
    """Runs one service until told to stop."""

    def __init__(
        self,
        service: Service,
        clock: Clock,
        stop: threading.Event,
        config: LoopConfig | None = None,
    ) -> None:
        self._service = service
        self._clock = clock
        self._stop = stop
        self._config = config or LoopConfig()
        self._log = log.bind(service=service.name)
        self._failures = 0
        self._crashes = 0
        self._away_since: float | None = None

    def run(self) -> bool:
        """Pass after pass until stopped; False when the service crashed too often in a row."""
        try:
            while not self._stop.is_set():
                wait_s = self._pass()
                if self._crashes >= self._config.max_crashes:
                    self._log.critical("service_gave_up", crashes=self._crashes)
                    return False
                if wait_s > 0:
                    self._clock.sleep(wait_s)
            return True
        finally:
            self._close()

    def _pass(self) -> float:
        """Run the body once; returns how long to wait before the next pass."""
        try:
            did_something = bool(self._service.run_once())
        except Unavailable as error:
            if self._away_since is None:
                self._away_since = self._clock.now()
                self._log.warning("dependency_away", error=error.in_full)
            self._crashes = 0
            return self._failed()
        except QlmError as error:
            self._log.warning("pass_failed", error=error.message, code=error.code)
            self._crashes = 0
            return self._failed()
        except Exception:  # noqa: BLE001 - the loop must survive any bug; it is logged in full
            self._crashes += 1
            self._log.exception("pass_crashed", consecutive=self._crashes)
            return self._failed()
        if self._away_since is not None:
            away_s = round(self._clock.now() - self._away_since, 1)
            self._log.info("dependency_back", away_s=away_s)
            self._away_since = None
        self._failures = self._crashes = 0
        return 0.0 if did_something else self._service.idle_s

    def _failed(self) -> float:
        self._failures += 1
        return self._config.backoff_s(self._failures)

    def _close(self) -> None:
        try:
            self._service.close()
        except QlmError as error:
            self._log.warning("close_failed", error=error.in_full)
        except Exception:  # noqa: BLE001 - the loop must survive any bug; it is logged in full
            self._log.exception("close_crashed")


def run_services(
    services: Sequence[Service],
    clock: Clock,
    stop: threading.Event,
    config: LoopConfig | None = None,
) -> int:
    """Run each service on its own thread until `stop` is set; returns the process's exit status.

    0 after an orderly stop; 1 when a service crashed too often, which stops the others too.
    """
    outcomes: list[bool] = []

    def body(service: Service) -> None:
        ok = False
        try:
            ok = ServiceLoop(service, clock, stop, config).run()
        finally:
            outcomes.append(ok)
            if not ok:
                stop.set()

    threads = [
        threading.Thread(target=body, args=(service,), name=service.name) for service in services
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 0 if all(outcomes) else 1


def stop_on_signals(stop: threading.Event) -> None:
    """Set `stop` on the first SIGTERM or SIGINT; a second one ends the process at once.

    Call from the main thread, which must not itself wait on `stop` (`run_services` joins threads).
    """

    def handle(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        stop.set()

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
