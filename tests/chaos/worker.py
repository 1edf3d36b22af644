"""A real worker process whose simulated engine can be made to misbehave.

Run as `python -m tests.chaos.worker ANSWERS`, with the settings of a worker in the environment.
Every answer is noted in the file ANSWERS, with the times between which it was computed. SIGUSR1
makes the engine hang until the process ends, SIGUSR2 makes it die, SIGHUP makes the clock jump.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any

from qlm_batch.domain.engine import EngineAnswer, EngineRequest, EngineStats
from qlm_batch.logs import configure_logging
from qlm_batch.settings import load_settings
from qlm_workers import app
from qlm_workers.simulated_engine import SimulatedEngine
from qlm_workers.simulated_parts import Faults
from tests.chaos.answers import FLAKY, LIVE, POISON

NOTE = struct.Struct("<Qdd")
"""One answer: a hash of the request's body, and the monotonic times of its begin and end."""

_state = {"hangs": False, "dies": False}


class MisbehavingEngine(SimulatedEngine):
    """The simulated engine with poison, nonsense, and orders from signals."""

    notes: int
    """Descriptor of the file of answers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, faults=Faults(poison=lambda r: POISON in r.body))
        self._babbled: set[str] = set()

    async def answer(self, request: EngineRequest) -> EngineAnswer:
        """As the engine does, noted."""
        if FLAKY in request.body and request.body not in self._babbled:
            self._babbled.add(request.body)
            raise ValueError("what the engine said makes no sense")
        began = time.monotonic()
        answer = await super().answer(request)
        if LIVE not in request.body:
            digest = hashlib.blake2b(request.body.encode(), digest_size=8).digest()
            note = NOTE.pack(int.from_bytes(digest, "little"), began, time.monotonic())
            os.write(self.notes, note)
        return answer

    def stats(self) -> EngineStats:
        """As the engine does; here it also dies when told to."""
        if _state["dies"]:
            self._die()
        return super().stats()

    def _finish_step(self, now: float, step_s: float) -> None:
        if not _state["hangs"]:
            super()._finish_step(now, step_s)


def _set(name: str) -> None:
    _state[name] = True


def _jump() -> None:
    real, step = time.time, random.choice((-86_400.0, -3600.0, 3600.0, 86_400.0))
    time.time = lambda: real() + step


def main(notes: Path) -> int:
    """Run the worker until it ends; its exit status."""
    MisbehavingEngine.notes = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    signal.signal(signal.SIGUSR1, lambda *_: _set("hangs"))
    signal.signal(signal.SIGUSR2, lambda *_: _set("dies"))
    signal.signal(signal.SIGHUP, lambda *_: _jump())
    # The name is not exported there, and this is the only place that replaces it.
    setattr(app, "make_engine", MisbehavingEngine.from_settings)  # noqa: B010
    settings = load_settings()
    configure_logging(settings)
    return app.run_worker(settings)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
