"""A runner at work on a ledger and an engine steered by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from structlog.testing import capture_logs

from qlm_batch.domain.engine import EngineAnswer, EngineRequest
from qlm_batch.domain.jobs import ClaimedSlice, EngineKind
from qlm_batch.settings import Settings
from qlm_workers import link
from qlm_workers.exits import Exit
from qlm_workers.hosts import Host
from qlm_workers.meter import Meter
from qlm_workers.runner import Runner
from tests.unit.worker_fakes import FakeEngine, FakeStore

DEFAULTS: dict[str, Any] = {
    "flush_s": 0.005,
    "poll_s": 0.02,
    "heartbeat_s": 0.02,
    "stall_s": 30.0,
    "lease_s": 30.0,
    "models": ("m",),
}


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Try again at once, and render no tracebacks; for every test that imports it."""
    monkeypatch.setattr(link, "BACKOFF_S", (0.005,))
    # Rendering tracebacks takes longer than all the rest.
    with capture_logs():
        yield


class Rig:
    """A runner at work."""

    def __init__(
        self,
        store: FakeStore,
        *engines: FakeEngine,
        adapters: Sequence[str] = (),
        **changes: Any,
    ) -> None:
        self.store = store
        self.engines = engines
        settings = Settings(**DEFAULTS | changes)
        names = ["m", "other"]
        meters = [Meter("gpu-0", "cpu", name) for name in adapters]
        hosts = [
            Host(name, EngineKind.GENERATE, engine, Meter("gpu-0", "cpu", name), *meters)
            for name, engine in zip(names, engines, strict=False)
        ]
        self.runner = Runner(store, hosts, settings, boot_id="boot", device="cpu")
        self.task = asyncio.create_task(self.runner.run())

    async def ended(self) -> Exit:
        async with asyncio.timeout(10):
            return await self.task


@asynccontextmanager
async def working(store: FakeStore, *engines: FakeEngine, **changes: Any) -> AsyncIterator[Rig]:
    """A runner at work, ended afterwards."""
    rig = Rig(store, *engines, **changes)
    try:
        yield rig
    finally:
        store.away = False
        rig.runner.end(Exit.OK)
        await rig.ended()


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait until the condition holds; fail when it does not in time."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - the condition may be anything
            await asyncio.sleep(0.002)


async def heartbeats(store: FakeStore, number: int) -> None:
    """Let so many heartbeats pass: whatever was about to happen has happened then."""
    seen = len(store.beats)
    await until(lambda: len(store.beats) >= seen + number)


def hold_until(gate: asyncio.Event, engine: FakeEngine) -> None:
    """Let every request wait at the engine's door."""
    plain = engine.answer

    async def answer(request: EngineRequest) -> EngineAnswer:
        await gate.wait()
        return await plain(request)

    engine.answer = answer  # type: ignore[method-assign]


def positions(*slices: ClaimedSlice) -> set[int]:
    """Where the requests of these slices stand in their runs."""
    return {r.position for s in slices for r in s.requests}


def hang(_: EngineRequest) -> None:
    """The answer of an engine that gives none."""
    return
