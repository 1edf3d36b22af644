"""Files, batches, runs, slices and results: what a user handed over and what became of it.

Times are seconds since the Unix epoch, on the database's clock. Durations are seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"
ENDPOINTS = (CHAT, COMPLETIONS, EMBEDDINGS)

SLICE_REQUESTS = 64
"""Most requests in one slice, unless the settings say otherwise."""


class SloClass(StrEnum):
    """What a request's deadline is about: its first token, or its last."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


class EngineKind(StrEnum):
    """What an engine computes; one engine serves one kind."""

    GENERATE = "generate"
    EMBED = "embed"


class FilePurpose(StrEnum):
    """OpenAI's purposes for the files of a batch."""

    BATCH = "batch"
    BATCH_OUTPUT = "batch_output"


class BatchState(StrEnum):
    """OpenAI's eight states; `transitions.BATCH` says which may follow which."""

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


class SliceState(StrEnum):
    """`queued`, `assigned` and `leased` are open: only an open slice takes results."""

    QUEUED = "queued"
    ASSIGNED = "assigned"
    LEASED = "leased"
    DONE = "done"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


class OnMiss(StrEnum):
    """What happens to lines whose deadline passes: end them, or finish them late."""

    EXPIRE = "expire"
    FINISH_LATE = "finish_late"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """An uploaded or produced file; its bytes lie in the blob store under `blob_key`."""

    id: str
    tenant: str
    purpose: FilePurpose
    filename: str
    bytes: int
    sha256: str
    blob_key: str
    created_at: float
    expires_at: float | None = None


@dataclass(frozen=True, slots=True)
class Callbacks:
    """Where completion is announced; either may be absent."""

    webhook: str | None = None
    email: str | None = None


@dataclass(frozen=True, slots=True)
class RequestCounts:
    """`completed` lines succeeded and `failed` lines did not; the rest are open."""

    total: int = 0
    completed: int = 0
    failed: int = 0

    @property
    def open(self) -> int:
        """Lines without an outcome yet."""
        return self.total - self.completed - self.failed


# Not frozen: many are made, and freezing makes that take several times as long.
@dataclass(slots=True, unsafe_hash=True)
class Usage:
    """Tokens as the engine counted them."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.input_tokens + other.input_tokens,
            self.cached_tokens + other.cached_tokens,
            self.output_tokens + other.output_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
        )

    @property
    def total_tokens(self) -> int:
        """Input and output together."""
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True, slots=True)
class LineError:
    """Why validation refused a file, and where; `line` is 1-based, None for the whole file."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


# Not frozen: many are made, and freezing makes that take several times as long.
@dataclass(slots=True, unsafe_hash=True)
class Estimate:
    """When a batch will be done: quantiles as absolute times, and the chance of a miss in [0, 1].

    `p50` and `p95` are None while nothing is known (no instance serves the model): see `reason`.
    """

    p50: float | None
    p95: float | None
    miss_probability: float | None
    reason: str
    made_at: float


@dataclass(frozen=True, slots=True)
class Promise:
    """The estimate shown when a batch was accepted, kept to be compared with what happened."""

    p50: float | None
    p95: float | None
    reason: str
    estimator: str
    made_at: float


@dataclass(frozen=True, slots=True)
class BatchSpec:
    """A request to run a file: everything the client decides."""

    tenant: str
    endpoint: str
    input_file_id: str
    completion_window: str
    window_s: float
    metadata: Mapping[str, str] | None = None
    callbacks: Callbacks = field(default_factory=Callbacks)
    on_miss: OnMiss = OnMiss.EXPIRE
    strict: bool = False
    output_expires_after_s: float | None = None
    idempotency_key: str | None = None
    fingerprint: str | None = None
    """Hash of the create call's body, compared when an idempotency key is used again."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A submitted file and how far it is. `deadline` is absolute and set at acceptance."""

    id: str
    spec: BatchSpec
    state: BatchState
    generation: int
    created_at: float
    deadline: float
    counts: RequestCounts = field(default_factory=RequestCounts)
    usage: Usage = field(default_factory=Usage)
    models: tuple[str, ...] = ()
    errors: tuple[LineError, ...] = ()
    error_count: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: float | None = None
    finalizing_at: float | None = None
    completed_at: float | None = None
    failed_at: float | None = None
    expired_at: float | None = None
    cancelling_at: float | None = None
    cancelled_at: float | None = None
    estimate: Estimate | None = None
    promise: Promise | None = None


# Not frozen: one is made for each line of a file, and freezing triples the time that takes.
@dataclass(slots=True)
class RequestLine:
    """One parsed line of a file, ready to be stored. `body` is the JSON text sent to the engine.

    `deadline` is the line's own absolute deadline, None when it shares the batch's.
    `prompt_tokens` is an estimate; `max_tokens` the most it may generate, None when unbounded.
    """

    line: int
    custom_id: str
    model: str
    body: str
    prompt_tokens: int
    max_tokens: int | None
    deadline: float | None = None


# Not frozen: one is made for each request served, and freezing triples the time that takes.
@dataclass(slots=True, unsafe_hash=True)
class ClaimedRequest:
    """A request inside a claimed slice that still needs a result in this generation."""

    run_id: int
    position: int
    body: str
    deadline: float | None
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class ClaimedSlice:
    """A lease: this holder may work on these requests until the lease ends or is renewed.

    `epoch` fences it. `suspect` slices were inside an engine that died: they run alone.
    `deadline` is the time to order by; `expires_at` ends unfinished lines, None for finish_late.
    """

    slice_id: int
    epoch: int
    run_id: int
    generation: int
    batch_id: str
    tenant: str
    model: str
    endpoint: str
    deadline: float
    expires_at: float | None
    suspect: bool
    requests: tuple[ClaimedRequest, ...]


# Not frozen: one is made for each request served, and freezing triples the time that takes.
@dataclass(slots=True)
class ResultRow:
    """What came back for one request. `body` is JSON text.

    An HTTP answer has `status_code` and `body`; any other failure has `error_code` and
    `error_message` and no body. Only a 2xx answer is a success.
    """

    slice_id: int
    epoch: int
    run_id: int
    position: int
    generation: int
    request_id: str
    status_code: int | None = None
    body: str | None = None
    error_code: str | None = None
    error_message: str | None = None
    usage: Usage = field(default_factory=Usage)
    started_at: float | None = None
    first_token_s: float | None = None
    duration_s: float | None = None

    @property
    def ok(self) -> bool:
        """Whether this is a success."""
        return self.status_code is not None and 200 <= self.status_code < 300


@dataclass(frozen=True, slots=True)
class ExportLine:
    """One line's outcome: a row (success or error), or None where its slice closed without one."""

    run_id: int
    position: int
    custom_id: str
    closed_as: SliceState
    ok: bool
    request_id: str | None = None
    status_code: int | None = None
    body: str | None = None
    error_code: str | None = None
    error_message: str | None = None


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key's owner, role and limits; the key itself is known only as a hash."""

    id: str
    tenant: str
    name: str
    role: str
    prefix: str
    created_at: float
    revoked_at: float | None = None
    limits: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OutboxItem:
    """A completion event to deliver over one channel (`webhook`, `email`), held under a lease."""

    id: int
    event_id: str
    tenant: str
    batch_id: str
    generation: int
    type: str
    channel: str
    target: str
    created_at: float
    attempts: int


@dataclass(frozen=True, slots=True)
class DeliveryAttempt:
    """One try to deliver an event; `retry_at` None ends it (delivered, or dead when not `ok`).

    `at` is the store's time of recording it; None until then.
    """

    outbox_id: int
    ok: bool
    status_code: int | None
    detail: str
    duration_s: float
    retry_at: float | None
    at: float | None = None
