"""Takes back what lost leases held, and expires what is past its time."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Protocol

import structlog

from qlm_batch.control.leadership import Leadership
from qlm_batch.domain.errors import NotLeader
from qlm_batch.domain.ledger import Reaped
from qlm_batch.domain.ports import Clock

log = structlog.get_logger(__name__)


class Reapable(Protocol):
    """The part of the store a reaper needs."""

    def ping(self) -> None:
        """Raise Unavailable unless the database answers."""
        ...

    def reap(self, epoch: int) -> Reaped:
        """See the Ledger port."""
        ...


@dataclass(frozen=True, slots=True)
class ReaperConfig:
    """Leases last `lease_s`; a pass is made every `period_s`; a silence of `gap_s` is an outage."""

    lease_s: float = 30.0
    period_s: float = 1.0
    gap_s: float = 5.0


class Reaper:
    """A service that reaps while its process leads.

    After an outage leases have run out although their holders live, so it waits until it has
    reached the database without a gap for one lease term: long enough for every holder to renew.
    """

    def __init__(
        self, store: Reapable, clock: Clock, leadership: Leadership, config: ReaperConfig
    ) -> None:
        self._store = store
        self._clock = clock
        self._leadership = leadership
        self._config = config
        self._since: float | None = None
        self._last = 0.0

    @property
    def name(self) -> str:
        """As in the log."""
        return "reaper"

    @property
    def idle_s(self) -> float:
        """Time between passes."""
        return self._config.period_s

    def run_once(self) -> Reaped | None:
        """One pass; None when nothing changed.

        Nothing is reaped by a standby or within a lease term of an outage.
        """
        try:
            self._store.ping()
            reaped = self._reap() if self._settled() else Reaped()
        except Exception:
            self._since = None
            raise
        self._last = self._clock.now()
        if not reaped.any:
            return None
        log.info("reaped", **asdict(reaped))
        return reaped

    def close(self) -> None:
        """Nothing is held."""

    def _settled(self) -> bool:
        """Whether the database has been within reach for a lease term, as of this pass."""
        now = self._clock.now()
        if self._since is None or now - self._last > self._config.gap_s:
            if self._since is not None:
                log.warning("database_gap", seconds=round(now - self._last, 1))
            self._since = now
        return now - self._since >= self._config.lease_s

    def _reap(self) -> Reaped:
        epoch = self._leadership.epoch
        if epoch is None:
            return Reaped()
        try:
            return self._store.reap(epoch)
        except NotLeader:
            self._leadership.step_down()
            return Reaped()
