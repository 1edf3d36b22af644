"""Renews a lease from the side while its holder is busy with one long step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

import structlog

from qlm_batch.domain.errors import Conflict, Unavailable

log = structlog.get_logger(__name__)


class KeepAlive:
    """While the block runs, `renew` is called every third of the lease, on a thread of its own.

    `renew` answers False when the lease is lost. `check` then raises Conflict; call it often.
    """

    def __init__(self, renew: Callable[[], bool], lease_s: float) -> None:
        self._renew = renew
        self._every_s = lease_s / 3
        self._done = threading.Event()
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keep-alive", daemon=True)

    def __enter__(self) -> KeepAlive:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()

    def check(self) -> None:
        """Raise Conflict once the lease is known to be lost."""
        if self._lost.is_set():
            raise Conflict("The lease on this batch was lost.", code="lease_lost")

    def _run(self) -> None:
        while not self._done.wait(self._every_s):
            try:
                if not self._renew():
                    self._lost.set()
                    return
            except Unavailable as error:
                log.warning("lease_not_renewed", error=error.in_full)
            except Exception:
                log.exception("lease_renewal_crashed")
                self._lost.set()
                return
