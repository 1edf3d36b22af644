"""The thread with the event loop, and how signals end it.

First SIGTERM or SIGINT: claim nothing more, finish what runs within GRACE_S, give the rest back.
A second one, or SIGQUIT: stop what runs and give it back at once. A third: die.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from importlib.util import find_spec
from types import FrameType

import structlog

from qlm_batch.domain.messages import Interactive
from qlm_workers.exits import Exit
from qlm_workers.runner import Runner

log = structlog.get_logger(__name__)

GRACE_S = 20.0
"""How long running requests may go on after the first signal."""
EXIT_S = 10.0
"""How long the process may live on after its engines have ended."""


class EngineThread:
    """Runs a Runner in an event loop of its own; its methods may be called from any thread.

    `on_end` is called from that thread when the runner has ended.
    """

    def __init__(self, runner: Runner, on_end: Callable[[Exit], None] = lambda _: None) -> None:
        self._runner = runner
        self._on_end = on_end
        self._loop = _new_loop()
        self._thread = threading.Thread(target=self._run, name="engines", daemon=True)
        self.verdict: Exit | None = None
        self.told_to_end = False
        """Whether somebody asked for the end; an orderly end nobody asked for is a fault."""

    def start(self) -> None:
        """Start engines and runner; returns at once."""
        self._thread.start()

    def wake(self, boot_id: str | None = None) -> None:
        """Slices were assigned to this boot."""
        self._order(lambda: self._runner.wake(boot_id))

    def review(self) -> None:
        """Slices may have been closed."""
        self._order(self._runner.review)

    def interactive(self, message: Interactive) -> None:
        """Somebody waits for the answer to this."""
        self._order(lambda: self._runner.interactive(message))

    def drain(self, grace_s: float = GRACE_S) -> None:
        """End when the work in hand is done, at most after `grace_s`."""
        self.told_to_end = True
        self._order(lambda: self._runner.drain(grace_s))

    def end(self) -> None:
        """End at once, in order."""
        self._order(lambda: self._runner.end(Exit.OK))

    def join(self, timeout_s: float | None = None) -> Exit | None:
        """Wait for the end; None when it takes longer, or was never begun."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return self.verdict

    def _order(self, order: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(order)
        except RuntimeError:
            log.debug("order after the end")

    def _run(self) -> None:
        verdict = Exit.CRASHED
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                verdict = runner.run(self._runner.run())
        except Exception:
            log.exception("worker crashed")
        finally:
            self.verdict = verdict
            log.info("engines ended", verdict=verdict.name)
            self._on_end(verdict)


def _new_loop() -> asyncio.AbstractEventLoop:
    """An event loop: uvloop's, whose hops cost less, where it is installed."""
    if find_spec("uvloop") is None:
        return asyncio.new_event_loop()
    import uvloop

    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def end_on_signals(engines: EngineThread) -> None:
    """Install the handlers described above; call from the main thread."""
    calm = True

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal calm
        if calm and number != signal.SIGQUIT:
            calm = False
            engines.drain()
            return
        for each in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            signal.signal(each, signal.SIG_DFL)
        engines.told_to_end = True
        engines.end()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, handle)


def exit_soon(verdict: Exit) -> None:
    """Make sure that the process ends within EXIT_S, whatever else still hangs in it."""
    timer = threading.Timer(EXIT_S, os._exit, [int(verdict)])
    timer.daemon = True
    timer.start()
