"""What the scheduler sees at one instant, and what it decides.

A snapshot holds runs with counts of open slices, never requests, so planning a million queued
requests costs no more than planning their runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from qlm_batch.domain.buckets import PromptMix
from qlm_batch.domain.jobs import EngineKind, Estimate, OnMiss, SloClass


class Residency(StrEnum):
    """Where a model's weights are on an instance; a `failed` one could not be made awake there."""

    AWAKE = "awake"
    ASLEEP = "asleep"
    COLD = "cold"
    FAILED = "failed"


class InstanceState(StrEnum):
    """`starting` and `swapping` take assignments but run nothing yet; `draining` takes none."""

    STARTING = "starting"
    READY = "ready"
    SWAPPING = "swapping"
    DRAINING = "draining"
    LOST = "lost"


# Not frozen: thousands are made for a plan, and freezing makes that take ten times as long.
@dataclass(slots=True, unsafe_hash=True)
class RunView:
    """The queued part of one (run, generation): what can still be placed.

    `requests`, `prompt_tokens` and `max_tokens` are sums over the queued slices; `max_tokens`
    counts unbounded requests at the model's limit, so it is an upper bound. `deadline` is absolute.
    `prompts` are those of the whole run, as it was read.
    """

    run_id: int
    generation: int
    batch_id: str
    tenant: str
    model: str
    kind: EngineKind
    slo_class: SloClass
    deadline: float
    created_at: float
    on_miss: OnMiss
    slices: int
    requests: int
    prompt_tokens: int
    max_tokens: int
    prompts: PromptMix = ()


# Not frozen: hundreds are made for a snapshot, and freezing makes that take several times as long.
@dataclass(slots=True, unsafe_hash=True)
class AssignedView:
    """Work of one (run, generation) already at an instance: `requests` remaining in `slices`.

    `prompts` are those of the whole run.
    """

    run_id: int
    generation: int
    batch_id: str
    tenant: str
    model: str
    deadline: float
    slices: int
    leased_slices: int
    requests: int
    prompt_tokens: int
    max_tokens: int
    prompts: PromptMix = ()


@dataclass(frozen=True, slots=True)
class ModelView:
    """A model an instance hosts, where it is now, and what moving it costs.

    `wake_s` is the time to make it the awake one from where it is, or for the awake one once
    another took its place; None when not measured yet. `max_model_len` is 0 while unknown. `swaps`
    counts how often it was made awake since the boot, `swap_s` the seconds that took in all.
    `stay_s` is how long the awake one would keep its place against an interactive request for this
    one. `parent` is the model whose engine serves it where it is an adapter, empty otherwise.
    `fault` says why a failed one is.
    """

    name: str
    kind: EngineKind
    residency: Residency
    max_model_len: int
    wake_s: float | None = None
    swaps: int = 0
    swap_s: float = 0.0
    stay_s: float = 0.0
    parent: str = ""
    fault: str = ""

    @property
    def root(self) -> str:
        """The model whose engine serves it."""
        return self.parent or self.name


@dataclass(frozen=True, slots=True)
class Latency:
    """What answered requests of one class took in an instance's engines, summed since its boot.

    `requests` had their first tokens after `first_s` seconds in all; `tokens` more came within
    `tokens_s`. Requests whose engine tells no times are left out.
    """

    slo_class: SloClass
    requests: int = 0
    first_s: float = 0.0
    tokens: int = 0
    tokens_s: float = 0.0

    def after(self, first_s: float | None, duration_s: float | None, tokens: int) -> Latency:
        """With one more request, of `tokens` in all."""
        if first_s is None or duration_s is None:
            return self
        return Latency(
            self.slo_class,
            self.requests + 1,
            self.first_s + first_s,
            self.tokens + max(0, tokens - 1),
            self.tokens_s + (duration_s - first_s if tokens > 1 else 0.0),
        )


@dataclass(frozen=True, slots=True)
class InstanceView:
    """A worker and what it can run at once.

    `slots` is the largest running batch; `kv_tokens` its key-value capacity in tokens;
    `running` the requests inside the engine; `generated` the output tokens each running request
    has produced, for residual life. `interactive_share` is the part of it that interactive work
    takes, in [0, 1]. `batch_cap` bounds the batch requests inside; `kv_usage` is the share of
    `kv_tokens` in use; `evictions`, `recomputed_tokens` and `output_tokens` count since its boot.
    """

    name: str
    boot_id: str
    device: str
    state: InstanceState
    models: tuple[ModelView, ...]
    slots: int
    kv_tokens: int
    running: int
    interactive_running: int
    generated: tuple[int, ...] = ()
    assigned: tuple[AssignedView, ...] = ()
    suspect_slices: int = 0
    tokens_per_s: float = 0.0
    interactive_share: float = 0.0
    batch_cap: int = 0
    evictions: int = 0
    recomputed_tokens: int = 0
    output_tokens: int = 0
    kv_usage: float = 0.0
    latencies: tuple[Latency, ...] = ()


@dataclass(frozen=True, slots=True)
class QueueEntry:
    """One group in a saved virtual queue."""

    instance: str
    position: int
    group_key: str
    slices: int
    reason: str


@dataclass(frozen=True, slots=True)
class Profile:
    """What was learned about one (model, device): opaque to the store, read by the estimator."""

    model: str
    device: str
    data: Mapping[str, object]


class Output(NamedTuple):
    """A finished request; `cut` where a bound on its tokens ended it, not the answer itself."""

    tenant: str
    tokens: int
    prompt_tokens: int
    cut: bool = False


Call = tuple[float, float, str, int, int]
"""An interactive request answered: when it came (Unix time), in how many seconds its first token
was due then, tenant, output tokens and prompt tokens."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What an instance saw since it last reported; folded into profiles by the leader.

    `outputs` are finished requests of `model`, batch work all, their prompts as intake counted
    them; `calls` are interactive ones, which nothing is learned from. `steps` are rows (sequences,
    kv tokens, prefill tokens, seconds) of engine steps. `tokens` generated in `seconds` while busy
    give the measured throughput.
    """

    instance: str
    device: str
    model: str
    at: float
    outputs: tuple[Output, ...] = ()
    steps: tuple[tuple[int, int, int, float], ...] = ()
    tokens: int = 0
    requests: int = 0
    seconds: float = 0.0
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The whole queue and fleet at `now`. Equal snapshots give equal plans."""

    now: float
    runs: tuple[RunView, ...]
    instances: tuple[InstanceView, ...]
    queues: tuple[QueueEntry, ...] = ()
    profiles: tuple[Profile, ...] = ()
    unpromised: frozenset[str] = frozenset()
    """Ids of batches in progress that have no promise yet."""
    finishing: frozenset[str] = frozenset()
    """Ids of batches whose files are still to be written; nothing of them is queued any more."""


# Not frozen: thousands are made for a plan, and freezing makes that take ten times as long.
@dataclass(slots=True, unsafe_hash=True)
class GroupPart:
    """Slices of one (run, generation) inside a group."""

    run_id: int
    generation: int
    slices: int


# Not frozen: thousands are made for a plan, and freezing makes that take ten times as long.
@dataclass(slots=True, unsafe_hash=True)
class RequestGroup:
    """The unit the scheduler orders: open slices of one model, class, deadline bucket and tenant.

    `key` is stable from one plan to the next while the group lasts. `prompts` are those of the runs
    it is of; only their proportions count.
    """

    key: str
    model: str
    kind: EngineKind
    slo_class: SloClass
    tenant: str
    deadline: float
    arrived_at: float
    parts: tuple[GroupPart, ...]
    batches: tuple[str, ...]
    requests: int
    prompt_tokens: int
    max_tokens: int
    on_miss: OnMiss = OnMiss.EXPIRE
    prompts: PromptMix = ()

    @property
    def slices(self) -> int:
        """Slices over all parts."""
        return sum(part.slices for part in self.parts)


# Not frozen: thousands are made for a plan, and freezing makes that take ten times as long.
@dataclass(slots=True, unsafe_hash=True)
class PlannedGroup:
    """A group's place: when it is expected to start and finish (absolute), and why it is there.

    `shed` groups were let go: they stand behind all work that can still make its deadline. Of its
    requests, `share` are expected to be on time where that is not all of them.
    """

    group: RequestGroup
    start: float
    finish_mean: float
    finish_var: float
    reason: str
    shed: bool = False
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class VirtualQueue:
    """The ordered groups of one instance; the head's model is the one it should run."""

    instance: str
    groups: tuple[PlannedGroup, ...]


@dataclass(frozen=True, slots=True)
class Assignment:
    """Up to `slices` queued slices of (run, generation), to be placed at an instance in order."""

    instance: str
    run_id: int
    generation: int
    slices: int
    group_key: str


@dataclass(frozen=True, slots=True)
class Decision:
    """One line of the append-only story: what was done to a batch or group, and why."""

    kind: str
    at: float
    batch_id: str | None = None
    group_key: str | None = None
    instance: str | None = None
    detail: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """The order of everything at `made_at`, with an estimate per batch.

    `estimator` names the version that made the estimates; empty while there are none.
    """

    made_at: float
    policy: str
    queues: tuple[VirtualQueue, ...]
    unplaced: tuple[PlannedGroup, ...] = ()
    estimates: Mapping[str, Estimate] = field(default_factory=dict)
    estimator: str = ""
