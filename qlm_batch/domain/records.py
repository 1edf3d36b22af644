"""What the store takes and returns beside jobs, snapshots and interactive requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from qlm_batch.domain.jobs import Batch, FileRecord
from qlm_batch.domain.snapshot import InstanceState, Latency, ModelView, Observation

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page of a list, newest first unless asked otherwise."""

    items: tuple[T, ...]
    has_more: bool


@dataclass(frozen=True, slots=True)
class IntakeTask:
    """A batch whose file waits to be read, claimed under a lease for this holder."""

    batch: Batch
    file: FileRecord


@dataclass(frozen=True, slots=True)
class ExportTask:
    """A batch whose outcome is settled and whose files wait to be written.

    The same export may be done again after a crash; only the first that finishes counts.
    """

    batch: Batch


@dataclass(frozen=True, slots=True)
class QueueTotals:
    """Open work now, for metrics and limits.

    `tokens` are those of prompts and the most that may be generated, where a request says so.
    """

    batches: int
    slices: int
    requests: int
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Attainment:
    """Batch requests with a success by their deadline, and those that expired or came late.

    Of batches that ended; lines that failed otherwise or were cancelled count as neither.
    """

    met: int = 0
    missed: int = 0


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """An instance's report; sent every second or two while it lives.

    `batch_cap` is how many batch requests may be inside its engines now; `kv_usage` the share of
    its key-value cache in use; `interactive_share` the part of its running batch that interactive
    work took lately, in [0, 1]. `evictions`, `recomputed_tokens` and `output_tokens` count since
    its boot.
    """

    name: str
    boot_id: str
    device: str
    state: InstanceState
    models: tuple[ModelView, ...]
    slots: int
    kv_tokens: int
    running: int = 0
    interactive_running: int = 0
    batch_cap: int = 0
    evictions: int = 0
    recomputed_tokens: int = 0
    output_tokens: int = 0
    kv_usage: float = 0.0
    latencies: tuple[Latency, ...] = ()
    generated: tuple[int, ...] = ()
    tokens_per_s: float = 0.0
    interactive_share: float = 0.0
    phase: str = ""
    observations: tuple[Observation, ...] = ()
