"""Interactive requests: one call, one answer, a target for the first token."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from qlm_batch.domain.jobs import Usage


class InteractiveState(StrEnum):
    """`sent` and `running` are open; an ended request never changes again."""

    SENT = "sent"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    ABORTED = "aborted"


OPEN_INTERACTIVE = frozenset({InteractiveState.SENT, InteractiveState.RUNNING})


@dataclass(frozen=True, slots=True)
class NewInteractive:
    """A call as it is routed: storing it leases it to this boot of `instance`, with epoch 1.

    `body` is the JSON text of the request, `ttft_s` the seconds its first token may take.
    """

    id: str
    tenant: str
    endpoint: str
    model: str
    body: str
    streamed: bool
    ttft_s: float
    instance: str
    boot_id: str


@dataclass(frozen=True, slots=True)
class InteractiveRequest:
    """A stored call and what became of it.

    `result` is the JSON text of the answer, or of a stream's events, one in each line. Bodies and
    results are None once their retention is over.
    """

    id: str
    tenant: str
    endpoint: str
    model: str
    body: str | None
    streamed: bool
    ttft_s: float
    instance: str
    boot_id: str
    epoch: int
    state: InteractiveState
    created_at: float
    ended_at: float | None = None
    status_code: int | None = None
    result: str | None = None
    usage: Usage = field(default_factory=Usage)
    first_token_s: float | None = None
    duration_s: float | None = None


@dataclass(frozen=True, slots=True)
class Timeliness:
    """How interactive requests that were answered lately fared: their number and quantiles.

    Times are seconds as the worker saw them, from taking a request up; None where nothing is known.
    `met` is the share whose first token came within its target.
    """

    requests: int = 0
    ttft_p50: float | None = None
    ttft_p95: float | None = None
    ttft_p99: float | None = None
    tpot_p50: float | None = None
    met: float | None = None


@dataclass(frozen=True, slots=True)
class InteractiveMark:
    """What a holder reports of a request under its `epoch`; marks of another epoch are void.

    `status_code` and `result` belong to an ended one: the engine's answer, or the error that was
    told in its place.
    """

    id: str
    epoch: int
    state: InteractiveState
    status_code: int | None = None
    result: str | None = None
    usage: Usage = field(default_factory=Usage)
    first_token_s: float | None = None
    duration_s: float | None = None
