"""The port to an inference engine; it is asynchronous because engines are."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, Self

from qlm_batch.domain.jobs import EngineKind, Usage
from qlm_batch.domain.snapshot import Residency


class Lso(StrEnum):
    """The four LLM serving operations an engine may support."""

    PULL = "pull"
    EVICT = "evict"
    BALANCE = "balance"
    SWAP = "swap"


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a started engine can hold: running requests, key-value tokens, context length.

    `keeps_asleep`: requests inside when it goes to sleep go on when it is awake again.
    """

    model: str
    kind: EngineKind
    max_model_len: int
    slots: int
    kv_tokens: int
    supports: frozenset[Lso] = field(default_factory=frozenset)
    keeps_asleep: bool = False


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One request as the engine gets it: `body` is the JSON text of an OpenAI request body.

    Lower `priority` runs first. `cache_salt` keeps tenants' prefix caches apart.
    """

    request_id: str
    endpoint: str
    body: str
    priority: int
    cache_salt: str


@dataclass(frozen=True, slots=True)
class EngineAnswer:
    """An HTTP-shaped answer: any status, with the JSON text of the response or error body.

    `first_token_s` and `duration_s` count from the call; None where the engine does not tell.
    `cut` where a bound on its tokens, the request's or the model's, ended one of its choices.
    """

    status_code: int
    body: str
    usage: Usage = field(default_factory=Usage)
    first_token_s: float | None = None
    duration_s: float | None = None
    cut: bool = False


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A cheap look inside. `step` grows whenever the engine makes progress.

    `steps` drains the rows (sequences, kv tokens, prefill tokens, seconds) since the last look.
    `generated` are output tokens so far of each running request. Since the start: `evictions`, how
    often a running request lost its place and kept its tokens, and `recomputed_tokens`, how many
    had their keys and values computed again for that.
    """

    step: int
    running: int
    waiting: int
    kv_usage: float
    generated_tokens: int
    steps: tuple[tuple[int, int, int, float], ...] = ()
    generated: tuple[int, ...] = ()
    evictions: int = 0
    recomputed_tokens: int = 0


class EventStream(Protocol):
    """The JSON texts that OpenAI sends as `data:` events, without the closing `[DONE]`."""

    def __aiter__(self) -> Self:
        """Itself."""
        ...

    def __anext__(self) -> Awaitable[str]:
        """The next event. Raises EngineDead when the engine stopped."""
        ...

    async def aclose(self) -> None:
        """Abort the request inside the engine unless it ended; call it in every case.

        Not while another task waits for the next event: cancel that task instead.
        """
        ...


class Engine(Protocol):
    """One model being served. Bad requests come back as answers with a 4xx status, never raised."""

    async def start(self) -> EngineInfo:
        """Load and be ready.

        Raises ConfigurationError with a remedy when the model can never run as configured, and
        EngineDead when it may with time.
        """
        ...

    async def answer(self, request: EngineRequest) -> EngineAnswer:
        """Serve one request to its end; cancelling the call aborts it inside the engine.

        Raises EngineDead when the engine stopped.
        """
        ...

    async def open_stream(self, request: EngineRequest) -> EngineAnswer | EventStream:
        """Serve one request as a stream, whether or not its body says `stream`.

        Returns with the first event, so after waiting and prefill; cancelling the call aborts the
        request. One that is refused or fails before comes back as an answer instead; one that
        fails later ends with an event `{"error": ...}`. Raises EngineDead.
        """
        ...

    def stats(self) -> EngineStats:
        """What the engine is doing now."""
        ...

    async def sleep(self) -> Residency:
        """Free the device for another engine; returns where the model is then: asleep or cold.

        Nothing may be inside, except where the engine keeps it. Raises EngineDead, and
        ConfigurationError where the engine cannot make room.
        """
        ...

    async def wake(self) -> EngineInfo:
        """Be ready again after `sleep` or `stop`. Raises as `start` does; may be tried again."""
        ...

    async def stop(self) -> None:
        """End the engine and every process it started; safe to call twice."""
        ...
