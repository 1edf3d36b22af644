"""What is asked of a simulated fleet: arrivals, their lengths and their classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qlm_batch.domain.jobs import SloClass

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class WorkClass:
    """Requests that are owed the same.

    `target_s` is the time to the first token when interactive, else the time to the last one.
    """

    name: str
    kind: SloClass
    target_s: float

    @property
    def interactive(self) -> bool:
        """Whether the first token is what counts."""
        return self.kind is SloClass.INTERACTIVE


@dataclass(frozen=True, slots=True, eq=False)
class Arrival:
    """What comes at one moment: one interactive request, or a batch with its lines' lengths."""

    at: float
    work_class: int
    model: str
    tenant: str
    prompts: Ints
    outputs: Ints


@dataclass(frozen=True, slots=True)
class Outage:
    """An instance that dies at `at` and comes back, as a new boot, after `seconds`."""

    at: float
    instance: int
    seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """Arrivals by time, over `duration` seconds; `max_tokens` is what requests may generate.

    `swap_failures` is the chance that waking a model fails and it has to be loaded instead.
    """

    name: str
    classes: tuple[WorkClass, ...]
    arrivals: tuple[Arrival, ...]
    duration: float
    max_tokens: int
    outages: tuple[Outage, ...] = ()
    swap_failures: float = 0.0


@dataclass(slots=True, eq=False)
class Requests:
    """Every request of a workload as arrays; a request's key is its index.

    `due` is when the first token (interactive) or the last (batch) is owed. `first` and `end` are
    what became of it, NaN for nothing. `offsets` are the first keys of the arrivals.
    """

    work_class: Ints
    model: Ints
    tenant: Ints
    arrival: Floats
    due: Floats
    prompt: Ints
    output: Ints
    offsets: Ints
    models: tuple[str, ...]
    tenants: tuple[str, ...]
    classes: tuple[WorkClass, ...]
    first: Floats = field(init=False)
    end: Floats = field(init=False)

    def __post_init__(self) -> None:
        self.first = np.full(len(self.arrival), np.nan)
        self.end = np.full(len(self.arrival), np.nan)

    def __len__(self) -> int:
        return len(self.arrival)

    @property
    def interactive(self) -> NDArray[np.bool_]:
        """Which of them are interactive."""
        return np.array([c.interactive for c in self.classes], dtype=np.bool_)[self.work_class]

    @property
    def on_time(self) -> NDArray[np.bool_]:
        """Which got what they were owed; what never ended did not."""
        return np.where(self.interactive, self.first, self.end) <= self.due


def requests_of(workload: Workload, start: float) -> Requests:
    """The workload's requests when its time 0 is `start`."""
    arrivals = workload.arrivals
    counts = np.array([len(a.prompts) for a in arrivals], dtype=np.int64)
    models = tuple(sorted({a.model for a in arrivals}))
    tenants = tuple(sorted({a.tenant for a in arrivals}))
    of_class = np.array([a.work_class for a in arrivals], dtype=np.int64)
    at = start + np.array([a.at for a in arrivals], dtype=np.float64)
    target = np.array([c.target_s for c in workload.classes])[of_class]

    def each(values: Sequence[float] | Floats | Ints) -> NDArray[np.float64]:
        return np.repeat(np.asarray(values), counts)

    return Requests(
        work_class=np.repeat(of_class, counts),
        model=np.repeat(np.array([models.index(a.model) for a in arrivals], dtype=int), counts),
        tenant=np.repeat(np.array([tenants.index(a.tenant) for a in arrivals], dtype=int), counts),
        arrival=each(at),
        due=each(at + target),
        prompt=np.concatenate([a.prompts for a in arrivals] or [np.zeros(0, np.int64)]),
        output=np.concatenate([a.outputs for a in arrivals] or [np.zeros(0, np.int64)]),
        offsets=np.concatenate(([0], np.cumsum(counts)))[:-1].astype(np.int64),
        models=models,
        tenants=tenants,
        classes=workload.classes,
    )
