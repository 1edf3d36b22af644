"""Ends interactive requests nobody waits for any more, and forgets old ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import structlog

from qlm_batch.domain.store import InteractiveStore
from qlm_batch.settings import Settings

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class InteractiveSweepConfig:
    """Bodies are kept `bodies_s` after their end, rows `rows_s`.

    Whoever waits for a request has `grace_s` to move it away from an instance that is gone.
    """

    bodies_s: float = 86_400.0
    rows_s: float = 30 * 86_400.0
    grace_s: float = 60.0
    idle_s: float = 10.0

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """As the settings say."""
        return cls(bodies_s=settings.interactive_bodies_s, rows_s=settings.interactive_rows_s)


@dataclass(frozen=True, slots=True)
class InteractiveSwept:
    """One pass: requests that were failed, and bodies or rows that were forgotten."""

    failed: int
    forgotten: int

    def __bool__(self) -> bool:
        return bool(self.failed or self.forgotten)


class InteractiveSweep:
    """A bounded pass at a time; any number of processes may run it."""

    name = "interactive-sweep"

    def __init__(self, store: InteractiveStore, config: InteractiveSweepConfig) -> None:
        self._store = store
        self._config = config
        self.idle_s = config.idle_s

    def run_once(self) -> InteractiveSwept:
        """Fail what was lost, and forget what is past its time."""
        config = self._config
        swept = InteractiveSwept(
            self._store.sweep_interactive(config.grace_s),
            self._store.forget_interactive(config.bodies_s, config.rows_s),
        )
        if swept.failed:
            log.info("interactive_lost", requests=swept.failed)
        return swept

    def close(self) -> None:
        """Nothing is held between passes."""
