"""What a simulated worker keeps: its periods, the leases it holds, and what it did."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import cast

from qlm_batch.domain.jobs import ClaimedSlice
from qlm_batch.domain.ledger import Held
from qlm_batch.domain.snapshot import Call
from qlm_batch.simulation.workload import Requests


@dataclass(frozen=True, slots=True)
class WorkerTimes:
    """A simulated worker's periods, seconds.

    `flush_s` is coarser than a real worker's, which spares store calls: the engine has a quarter
    more than its slots in hand all the time, so it never waits for one.
    """

    flush_s: float = 0.25
    poll_s: float = 1.5
    heartbeat_s: float = 2.0
    lease_s: float = 30.0


@dataclass(slots=True)
class Lease:
    """A slice in hand: which of its requests are `left`, by key."""

    slice: ClaimedSlice
    first_key: int
    claimed_at: float
    left: set[int]
    held: Held


def expiry(lease: Lease) -> float:
    """When its requests end unserved; inf for never."""
    expires_at = lease.slice.expires_at
    return math.inf if expires_at is None else expires_at


@dataclass(frozen=True, slots=True)
class Columns:
    """The requests' arrays once more, for single values: those of arrays are slow to come by."""

    prompt: memoryview[int]
    output: memoryview[int]
    arrival: memoryview[float]
    first: memoryview[float]
    end: memoryview[float]

    @staticmethod
    def of(requests: Requests) -> Columns:
        """Of these requests."""
        times = (requests.arrival.data, requests.first.data, requests.end.data)
        arrival, first, end = cast("tuple[memoryview[float], ...]", times)
        return Columns(requests.prompt.data, requests.output.data, arrival, first, end)


def call_of(requests: Requests, key: int) -> Call:
    """What an instance tells of an interactive request it answered."""
    came = float(requests.arrival[key])
    tenant = requests.tenants[int(requests.tenant[key])]
    sizes = int(requests.output[key]), int(requests.prompt[key])
    return came, float(requests.due[key]) - came, tenant, *sizes


@dataclass(frozen=True, slots=True)
class Span:
    """What an instance did for a while: served a batch's slice, or swapped to a model."""

    instance: str
    what: str
    model: str
    start: float
    end: float


@dataclass(slots=True)
class Tallies:
    """Sums over an instance's life, all boots together."""

    busy_s: float = 0.0
    swap_s: float = 0.0
    swaps: int = 0
    preemptions: int = 0
    recomputed: int = 0
    generated: int = 0
    spans: list[Span] = field(default_factory=list)
