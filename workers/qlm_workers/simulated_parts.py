"""What a simulated engine is made of: its faults, its swap times, and the requests inside."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qlm_batch.domain.engine import EngineRequest
from qlm_batch.domain.jobs import Usage
from qlm_workers.simulated_answers import choices


def _never(_: EngineRequest) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong, for tests: requests that kill the engine, fail with 500, or never end."""

    poison: Callable[[EngineRequest], bool] = _never
    fails: Callable[[EngineRequest], bool] = _never
    hangs: Callable[[EngineRequest], bool] = _never
    wakes: Iterator[bool] = field(default_factory=lambda: itertools.repeat(True))
    """Whether each wake works, one after the other."""
    error_rate: float = 0.0
    """Share of requests in [0, 1] that fail with 500, chosen by the seed."""


NO_FAULTS = Faults()


@dataclass(frozen=True, slots=True)
class SwapTimes:
    """Modelled seconds to load, to sleep and to wake.

    An engine that does not keep is ended by sleep and loaded again, as one on a host's processor.
    """

    load_s: float = 0.0
    sleep_s: float = 0.0
    wake_s: float = 0.0
    keeps: bool = True


AT_ONCE = SwapTimes()


@dataclass(slots=True)
class Inside:
    """A request inside the engine, and how far it is."""

    request_id: str
    priority: int
    arrival: int
    prompt_tokens: int
    output_tokens: int
    done: asyncio.Future[float]
    hangs: bool
    prefilled: int = 0
    generated: int = 0
    resumed: int = 0
    """Tokens generated before it gave way last: they are read again like a prompt."""
    first_token_at: float | None = None
    moved: asyncio.Event | None = None
    """Set with every token where someone reads along."""

    @property
    def to_prefill(self) -> int:
        """Tokens still to be read."""
        return self.prompt_tokens + self.resumed - self.prefilled

    @property
    def kv(self) -> int:
        """Tokens it holds in the key-value cache."""
        return self.prefilled + self.generated - self.resumed


@dataclass(frozen=True, slots=True)
class Job:
    """A request the engine takes, with what its seed draws for it."""

    request: EngineRequest
    body: Mapping[str, Any]
    key: int
    prompt_tokens: int
    output_tokens: int
    limit: int
    hangs: bool

    @property
    def usage(self) -> Usage:
        """Tokens of all its choices."""
        return Usage(
            input_tokens=self.prompt_tokens, output_tokens=self.output_tokens * self.choices
        )

    @property
    def choices(self) -> int:
        """How many answers it asks for."""
        return choices(self.request.endpoint, self.body)

    @property
    def stopped(self) -> bool:
        """Whether it ends by itself rather than by its limit; an embedding has none."""
        return self.output_tokens < self.limit or not self.limit
