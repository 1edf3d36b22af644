"""The real clock of a process."""

from __future__ import annotations

import threading
import time


class SystemClock:
    """Monotonic time; `sleep` ends early once `stop` is set, so that loops end promptly."""

    def __init__(self, stop: threading.Event | None = None) -> None:
        self._stop = stop or threading.Event()

    def now(self) -> float:
        """Monotonic seconds."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait, or return at once when `seconds` is not positive or the process is stopping."""
        if seconds > 0:
            self._stop.wait(seconds)
