"""What is measured of one interactive request."""

from __future__ import annotations

import time
from collections.abc import Sequence

from qlm_batch.api.metrics import Metrics
from qlm_batch.control.interactive import Calls


class Watch:
    """Times a request from `began` (perf_counter); `target_s` is for its first token."""

    def __init__(self, metrics: Metrics, calls: Calls, began: float, target_s: float) -> None:
        self._metrics = metrics
        self._calls = calls
        self._began = began
        self._target_s = target_s
        self._first_at: float | None = None
        self._last_at = began
        self._events = 0

    def told(self, events: Sequence[str], since_first_s: float = 0.0) -> None:
        """Something for the client has arrived, `since_first_s` after the first token was there."""
        self._last_at = time.perf_counter()
        self._events += len(events)
        if self._first_at is None:
            self._first_at = max(self._began, self._last_at - since_first_s)
            self._metrics.first_token(self._first_at - self._began, self._target_s)

    def ended(self, status: int) -> None:
        """The request is over."""
        self._metrics.interactive_ended(status)
        self._calls.took(time.perf_counter() - self._began)
        if self._first_at is not None and self._events > 1:
            self._metrics.per_token((self._last_at - self._first_at) / (self._events - 1))
