"""The tables of the in-memory store, as plain objects under one lock."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import update_wrapper
from typing import Concatenate, ParamSpec, TypeVar

from qlm_batch.domain.buckets import PromptMix
from qlm_batch.domain.errors import NotFound
from qlm_batch.domain.interactive import InteractiveRequest
from qlm_batch.domain.jobs import (
    ApiKey,
    Batch,
    DeliveryAttempt,
    EngineKind,
    Estimate,
    FileRecord,
    OutboxItem,
    RequestCounts,
    RequestLine,
    ResultRow,
    SliceState,
    Usage,
)
from qlm_batch.domain.records import Attainment, Heartbeat
from qlm_batch.domain.snapshot import Decision, Observation, Profile, QueueEntry

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound="Facet")

Part = tuple[int, int]
"""A run's id and a generation."""


@dataclass(slots=True)
class Tally:
    """Sums over slices: requests still to do, and bounds of their tokens."""

    slices: int = 0
    leased: int = 0
    suspects: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    max_tokens: int = 0
    unbounded: int = 0


@dataclass(slots=True)
class RunData:
    """A run with its lines by position, and the rows they got by generation and position."""

    id: int
    batch_id: str
    tenant: str
    model: str
    kind: EngineKind
    deadline: float
    prompts: PromptMix = ()
    lines: list[RequestLine] = field(default_factory=list)
    successes: set[int] = field(default_factory=set)
    rows: dict[int, dict[int, ResultRow]] = field(default_factory=lambda: defaultdict(dict))
    late: set[int] = field(default_factory=set)
    """Positions whose success came after its deadline."""


@dataclass(slots=True)
class SliceData:
    """Positions [lo, hi) of a run in one generation, and who works on them."""

    id: int
    run: RunData
    generation: int
    lo: int
    hi: int
    deadline: float
    expires_at: float | None
    remaining: int = 0
    prompt_tokens: int = 0
    max_tokens: int = 0
    unbounded: int = 0
    state: SliceState = SliceState.QUEUED
    epoch: int = 0
    instance: str | None = None
    place: int = 0
    lease_until: float = 0.0
    attempts: int = 0
    fruitful: bool = False
    preempt: bool = False
    part: Part = field(init=False)
    """The run and generation this belongs to."""

    def __post_init__(self) -> None:
        self.part = (self.run.id, self.generation)


@dataclass(slots=True)
class BatchData:
    """A batch as its owner sees it, but for its counts and estimate; what only the store knows."""

    view: Batch
    runs: list[RunData] = field(default_factory=list)
    order: list[tuple[RunData, int]] = field(default_factory=list)
    """Where each line went, in file order."""
    slices: list[SliceData] = field(default_factory=list)
    open: set[int] = field(default_factory=set)
    completed: int = 0
    failed: int = 0
    usage: Usage = field(default_factory=Usage)
    estimate: Estimate | None = None
    forecast: Mapping[str, object] | None = None
    slice_requests: int = 0
    missed: bool = False
    claim_holder: str | None = None
    claim_until: float = 0.0

    def shown(self) -> Batch:
        """The view with the counts and estimate of now, which change too often to be in it."""
        counts = RequestCounts(self.view.counts.total, self.completed, self.failed)
        return replace(self.view, counts=counts, usage=self.usage, estimate=self.estimate)


@dataclass(slots=True)
class InstanceData:
    """The newest report of an instance, and the boots that had its name before."""

    beat: Heartbeat
    at: float
    past_boots: set[str] = field(default_factory=set)
    retired: bool = False

    @property
    def gone(self) -> bool:
        """Whether the boot has retired or died."""
        return self.beat.boot_id in self.past_boots


@dataclass(slots=True)
class OutboxData:
    """A completion event on one channel; `next_at` None when it needs no more attempts."""

    item: OutboxItem
    next_at: float | None
    claim_until: float = 0.0


@dataclass(slots=True)
class LeaderData:
    """Who leads, fenced by `epoch`."""

    holder: str | None = None
    epoch: int = 0
    until: float = 0.0


@dataclass(slots=True)
class SecretData:
    """A webhook secret; `expires_at` is set when a newer one replaced it."""

    secret: str
    expires_at: float | None = None


class State:
    """Everything the store remembers. Guarded by `lock`; `clock` is the store's only time."""

    def __init__(self, clock: Callable[[], float], silent_s: float) -> None:
        self.clock = clock
        self.silent_s = silent_s
        self.lock = threading.RLock()
        self.files: dict[str, FileRecord] = {}
        self.unowned: dict[str, float] = {}
        """Since when no file has owned these blobs, by key."""
        self.batches: dict[str, BatchData] = {}
        self.idempotent: dict[tuple[str, str], str] = {}
        self.unfinished: dict[str, BatchData] = {}
        self.runs: dict[int, RunData] = {}
        self.slices: dict[int, SliceData] = {}
        self.queued: dict[Part, Tally] = {}
        self.waiting: dict[Part, list[tuple[int, int]]] = defaultdict(list)
        """Heaps of (attempts, slice id); entries no longer true are skipped when met."""
        self.placed: dict[str, dict[Part, Tally]] = defaultdict(dict)
        self.assigned: dict[str, dict[int, SliceData]] = defaultdict(dict)
        """By instance, in the order of assignment."""
        self.leased: dict[str, dict[int, SliceData]] = defaultdict(dict)
        self.expiring: list[tuple[float, int]] = []
        """A heap of (expires_at, slice id)."""
        self.instances: dict[str, InstanceData] = {}
        self.interactive: dict[str, InteractiveRequest] = {}
        self.leader = LeaderData()
        self.queue: list[QueueEntry] = []
        self.profiles: dict[tuple[str, str], Profile] = {}
        self.decisions: dict[str | None, list[Decision]] = defaultdict(list)
        self.observations: deque[Observation] = deque()
        self.outbox: dict[int, OutboxData] = {}
        self.deliveries: list[tuple[OutboxItem, DeliveryAttempt]] = []
        self.keys: dict[str, ApiKey] = {}
        self.keys_by_hash: dict[str, str] = {}
        self.secrets: dict[str, list[SecretData]] = defaultdict(list)
        self.attained = Attainment()
        self.numbers: dict[str, int] = defaultdict(int)

    def next(self, kind: str) -> int:
        """The next number of its kind, from 1."""
        self.numbers[kind] += 1
        return self.numbers[kind]

    def batch_of(self, tenant: str, batch_id: str) -> BatchData:
        """The tenant's batch. Raises NotFound."""
        found = self.batches.get(batch_id)
        if found is None or found.view.spec.tenant != tenant:
            raise NotFound(
                f"No batch found with id '{batch_id}'.", code="batch_not_found", param="batch_id"
            )
        return found

    def live_file(self, tenant: str, file_id: str) -> FileRecord | None:
        """The tenant's file; None when absent, deleted or expired."""
        record = self.files.get(file_id)
        if record is None or record.tenant != tenant:
            return None
        expired = record.expires_at is not None and record.expires_at <= self.clock()
        return None if expired else record


class Facet:
    """One part of the store's methods, over the shared state."""

    state: State


def locked(
    method: Callable[Concatenate[F, P], R],
) -> Callable[Concatenate[F, P], R]:
    """Make a method one transaction: nobody else reads or writes until it returns."""

    def alone(self: F, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.state.lock:
            return method(self, *args, **kwargs)

    update_wrapper(alone, method)
    return alone


def change(batch: BatchData, **fields: object) -> None:
    """Replace fields of the batch's view."""
    batch.view = replace(batch.view, **fields)  # type: ignore[arg-type]
