"""A ledger and an engine small enough to steer a runner by hand."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence

from qlm_batch.domain.engine import EngineAnswer, EngineInfo, EngineRequest, EngineStats
from qlm_batch.domain.errors import EngineDead, Unavailable
from qlm_batch.domain.jobs import (
    CHAT,
    ClaimedRequest,
    ClaimedSlice,
    EngineKind,
    ResultRow,
    Usage,
)
from qlm_batch.domain.ledger import Directive, FlushOutcome, Held, ReleaseReason
from qlm_batch.domain.records import Heartbeat
from qlm_batch.domain.snapshot import InstanceView, Residency

NOW = 1_000_000.0


def make_slice(
    slice_id: int,
    size: int = 4,
    *,
    model: str = "m",
    epoch: int = 1,
    expires_at: float | None = NOW + 3600,
    deadline: float | None = None,
    suspect: bool = False,
    body: str = "{}",
    due_in: float = 3600.0,
) -> ClaimedSlice:
    """A slice of `size` requests; `deadline` is each line's own, `due_in` the slice's."""
    return ClaimedSlice(
        slice_id=slice_id,
        epoch=epoch,
        run_id=1,
        generation=1,
        batch_id="batch_1",
        tenant="t",
        model=model,
        endpoint=CHAT,
        deadline=NOW + due_in,
        expires_at=expires_at,
        suspect=suspect,
        requests=tuple(
            ClaimedRequest(1, slice_id * 100 + n, body, deadline, 8) for n in range(size)
        ),
    )


class FakeStore:
    """Hands out the slices put into it, and remembers everything it is told."""

    def __init__(self, *slices: ClaimedSlice) -> None:
        self._lock = threading.Lock()
        self._waiting = list(slices)
        self._began = time.monotonic()
        self.rows: list[ResultRow] = []
        self.completed: set[int] = set()
        self.released: dict[int, ReleaseReason] = {}
        self.renewals: dict[int, int] = {}
        self.orders: dict[int, Directive] = {}
        self.beats: list[Heartbeat] = []
        self.claims: list[tuple[int, int]] = []
        self.retired = False
        self.away = False
        self.replaced = False
        self.ahead_s = 0.0
        """How far its clock was put forward."""
        self.may_tell = threading.Event()
        """Cleared, what a claim took is on its way to the worker."""
        self.may_tell.set()

    def put(self, *slices: ClaimedSlice) -> None:
        """Assign more slices."""
        with self._lock:
            self._waiting.extend(slices)

    @property
    def waiting(self) -> int:
        """Slices not handed out yet."""
        return len(self._waiting)

    def positions(self, *, ok: bool = True) -> set[int]:
        """Positions with a stored success, or error."""
        return {row.position for row in self.rows if row.ok is ok}

    def claim_slices(
        self, instance: str, boot_id: str, *, max_requests: int, lease_s: float, holding: int = 0
    ) -> Sequence[ClaimedSlice]:
        with self._call():
            self.claims.append((max_requests, holding))
            taken: list[ClaimedSlice] = []
            while self._waiting and sum(len(s.requests) for s in taken) < max_requests:
                if self._waiting[0].suspect and (holding or taken):
                    break
                taken.append(self._waiting.pop(0))
                if taken[-1].suspect:
                    break
        if taken:
            self.may_tell.wait()
        return taken

    def flush(
        self,
        instance: str,
        rows: Sequence[ResultRow],
        held: Sequence[Held],
        *,
        lease_s: float | None,
    ) -> FlushOutcome:
        with self._call():
            self.rows.extend(rows)
            for lease in held:
                if lease.complete:
                    self.completed.add(lease.slice_id)
                elif lease_s is not None:
                    self.renewals[lease.slice_id] = self.renewals.get(lease.slice_id, 0) + 1
            named = {row.slice_id for row in rows} | {lease.slice_id for lease in held}
            closed = dict.fromkeys(named & self.completed, Directive.CLOSED)
            return FlushOutcome(
                len(rows),
                0,
                dict.fromkeys(named, Directive.KEEP)
                | closed
                | {i: order for i, order in self.orders.items() if i in named},
            )

    def release(self, instance: str, held: Sequence[Held], reason: ReleaseReason) -> None:
        with self._call():
            self.released |= {lease.slice_id: reason for lease in held}

    def preempt(self, epoch: int, instance: str, slices: int) -> int:
        raise NotImplementedError

    def reap(self, epoch: int) -> object:
        raise NotImplementedError

    def heartbeat(self, beat: Heartbeat) -> bool:
        with self._call():
            self.beats.append(beat)
            return not self.replaced

    def retire(self, name: str, boot_id: str) -> None:
        with self._call():
            self.retired = True

    def died(self, name: str, boot_id: str) -> None:
        raise AssertionError("a worker does not tell of its own death")

    def instances(self) -> Sequence[InstanceView]:
        return ()

    def now(self) -> float:
        with self._call():
            return NOW + time.monotonic() - self._began + self.ahead_s

    def _call(self) -> threading.Lock:
        if self.away:
            raise Unavailable("the database is away")
        return self._lock


class FakeEngine:
    """Answers as `respond` says: an answer, an exception to raise, or None to hang."""

    def __init__(
        self,
        respond: Callable[[EngineRequest], EngineAnswer | Exception | None] = lambda _: good(),
        *,
        slots: int = 8,
    ) -> None:
        self.respond = respond
        self.slots = slots
        self.requests: list[EngineRequest] = []
        self.aborted: list[str] = []
        self.running = 0
        self.most_running = 0
        self.step = 0
        self.stopped = False
        self.start_error: Exception | None = None
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.keeps = False
        self.slept = 0
        self.wake_errors: list[Exception] = []
        self.may_wake = asyncio.Event()
        self.may_wake.set()

    async def start(self) -> EngineInfo:
        await self.may_start.wait()
        if self.start_error is not None:
            raise self.start_error
        return self._info()

    def _info(self) -> EngineInfo:
        return EngineInfo("m", EngineKind.GENERATE, 2048, self.slots, 4096, keeps_asleep=self.keeps)

    async def sleep(self) -> Residency:
        assert self.keeps or not self.running, "nothing may be inside"
        self.slept += 1
        return Residency.ASLEEP if self.keeps else Residency.COLD

    async def wake(self) -> EngineInfo:
        await self.may_wake.wait()
        if self.wake_errors:
            raise self.wake_errors.pop()
        return self._info()

    async def answer(self, request: EngineRequest) -> EngineAnswer:
        self.requests.append(request)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(0)
            said = self.respond(request)
            if said is None:
                await asyncio.Event().wait()
            if isinstance(said, Exception):
                raise said
            assert said is not None
            self.step += 1
            return said
        except asyncio.CancelledError:
            self.aborted.append(request.request_id)
            raise
        finally:
            self.running -= 1

    def stats(self) -> EngineStats:
        return EngineStats(self.step, self.running, 0, 0.0, self.step * 3)

    async def stop(self) -> None:
        self.stopped = True


def good(tokens: int = 3) -> EngineAnswer:
    """A success."""
    return EngineAnswer(200, '{"ok":true}', Usage(5, 0, tokens))


def dead(_: EngineRequest) -> EngineDead:
    """The engine is gone."""
    return EngineDead("the engine process ended")
