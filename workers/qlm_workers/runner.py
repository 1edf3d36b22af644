"""The loop around the engines: claim, feed, flush, and give everything back at the end."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Coroutine, Sequence
from typing import Any

import structlog

from qlm_batch.domain.errors import ConfigurationError, EngineDead, QlmError
from qlm_batch.domain.jobs import ClaimedSlice, ResultRow
from qlm_batch.domain.ledger import ReleaseReason
from qlm_batch.domain.messages import Interactive
from qlm_batch.domain.snapshot import InstanceState, Residency
from qlm_batch.scheduling import agent
from qlm_batch.settings import Settings
from qlm_workers import rows
from qlm_workers.exits import Exit
from qlm_workers.feeder import Feeder
from qlm_workers.flusher import Flusher
from qlm_workers.hosts import Host
from qlm_workers.interactive import InteractiveDesk
from qlm_workers.leases import Lease, LeaseTable
from qlm_workers.link import Link, WorkerStore, backoff, pause
from qlm_workers.reporter import Reporter
from qlm_workers.residents import Residents

log = structlog.get_logger(__name__)

WATCH_S = 0.1
"""How often deadlines and the engines' progress are looked at."""
MOST_BUFFERED_ROWS = 20_000
MOST_BUFFERED_BYTES = 256 * 1024**2
"""Beyond these nothing more is claimed until the store takes rows again."""
LAST_FLUSH_S = 15.0
"""How long the end waits for a store that is away before results are left to be computed again."""
STOP_ENGINE_S = 20.0


class Runner:
    """Serves one instance until told to end; `run` is called once, inside its event loop.

    All methods but `run` are plain calls from the same loop.
    """

    def __init__(
        self,
        store: WorkerStore,
        hosts: Sequence[Host],
        settings: Settings,
        *,
        boot_id: str,
        device: str,
        desk: InteractiveDesk | None = None,
    ) -> None:
        self._store = store
        self._link = Link(store)
        self._engines = tuple(hosts)
        self._hosts = {name: host for host in hosts for name in host.names}
        self._settings = settings
        self._name = settings.instance
        self._boot_id = boot_id
        self._desk = desk
        self._table = LeaseTable()
        self._feeder = Feeder(
            self._link, self._settle, self._engine_died, lambda: self.end(Exit.CRASHED)
        )
        self._residents = Residents(
            self._engines,
            self._table,
            settings,
            opened=self._feeder.feed,
            give_back=self._give_back,
            changed=lambda: self._beat_now.set(),
            lost=lambda: self.end(Exit.ENGINE_DIED),
        )
        self._reporter = Reporter(
            self._link, hosts, self._residents, name=self._name, boot_id=boot_id, device=device
        )
        self._flusher = Flusher(self._link, self._table, settings, self._flushed)
        self._state = InstanceState.STARTING
        self._phase = ""
        self._claim_now = asyncio.Event()
        self._beat_now = asyncio.Event()
        self._over = asyncio.Event()
        self._verdict: Exit | None = None
        self._claiming = True
        self._dry = False
        self._drained_by = float("inf")
        self._suspects: frozenset[Lease] = frozenset()

    # Orders from outside

    def wake(self, boot_id: str | None = None) -> None:
        """Slices were assigned; look now. A hint for another boot is ignored."""
        if boot_id in (None, self._boot_id):
            self._claim_now.set()

    def interactive(self, message: Interactive) -> None:
        """Serve a call that somebody waits for."""
        if self._desk is not None:
            self._desk.accept(message)

    def review(self) -> None:
        """Leases may have been closed; ask the store about all of them now."""
        self._flusher.review()

    def drain(self, grace_s: float) -> None:
        """Claim nothing more, and end once the work in hand is done or `grace_s` have passed."""
        if self._state is InstanceState.DRAINING:
            return
        log.info("draining", in_hand=self._table.in_hand, grace_s=grace_s)
        starting = self._state is InstanceState.STARTING
        self._state = InstanceState.DRAINING
        self._claiming = False
        if self._desk is not None:
            self._desk.refuse_more()
        self._drained_by = time.monotonic() + grace_s
        self._give_back(self._residents.retire())
        self._claim_now.set()
        if starting or self._all_done():
            self.end(Exit.OK)

    def end(self, verdict: Exit) -> None:
        """End now: running requests stop, what they brought is stored, leases are given back."""
        if self._verdict is None:
            self._verdict = verdict
            self._claiming = False
            self._feeder.close()
            for event in (self._over, self._claim_now, self._beat_now):
                event.set()

    # The life of the worker

    async def run(self) -> Exit:
        """Start the engines, serve, and return why it ended with nothing left running."""
        loops = [asyncio.create_task(self._guard(self._beat_forever()))]
        try:
            bodies: list[Coroutine[Any, Any, None]] = []
            if self._desk is not None:
                bodies = [
                    self._desk.write_forever(self._over),
                    self._desk.record_forever(self._over),
                ]
                loops += [asyncio.create_task(self._guard(body)) for body in bodies]
            if await self._start_engines():
                if self._desk is not None:
                    self._desk.begin(
                        self._link,
                        self._hosts,
                        self._boot_id,
                        died=self._engine_died,
                        idle=self._settled_all,
                    )
                bodies = [
                    self._claim_forever(),
                    self._flusher.run(self._over),
                    self._watch_forever(),
                ]
                loops += [asyncio.create_task(self._guard(body)) for body in bodies]
            await self._over.wait()
        finally:
            await self._close(loops)
        return Exit.CRASHED if self._verdict is None else self._verdict

    async def _guard(self, body: Coroutine[Any, Any, None]) -> None:
        try:
            await body
        except Exception:
            log.exception("worker loop crashed")
            self.end(Exit.CRASHED)

    async def _start_engines(self) -> bool:
        """Start the first engines, one by one; False when the worker is to end instead."""
        for host in self._residents.first:
            self._phase = f"loading {host.model}"
            began = time.monotonic()
            start = asyncio.create_task(self._start(host))
            over = asyncio.create_task(self._over.wait())
            await asyncio.wait({start, over}, return_when=asyncio.FIRST_COMPLETED)
            over.cancel()
            if not start.done():
                start.cancel()
            (fault,) = await asyncio.gather(start, return_exceptions=True)
            if self._verdict is not None:
                return False
            if fault is not None:
                log.error(
                    "engine did not start",
                    model=host.model,
                    error=str(fault) or type(fault).__name__,
                    exc_info=None if isinstance(fault, QlmError | TimeoutError) else fault,
                )
                known = isinstance(fault, ConfigurationError)
                self.end(Exit.MISCONFIGURED if known else Exit.ENGINE_DIED)
                return False
            log.info("engine ready", model=host.model, seconds=round(time.monotonic() - began, 2))
        self._phase = ""
        self._state = InstanceState.READY
        return True

    async def _start(self, host: Host) -> None:
        began = time.monotonic()
        async with asyncio.timeout(self._settings.start_timeout_s):
            info = await host.engine.start()
        now = time.monotonic()
        host.started(info, now, now - began)

    # Claim

    async def _claim_forever(self) -> None:
        failures = 0
        while self._claiming:
            self._claim_now.clear()
            try:
                self._dry = not await self._claim()
                failures = 0
            except Exception as error:  # noqa: BLE001 - no fault of the store may end the work
                failures += 1
                self._link.failed("claim", error, failures)
                await pause(self._over, backoff(failures))
                continue
            if self._dry or not self._wanted():
                await pause(self._claim_now, self._settings.poll_s)

    async def _claim(self) -> bool:
        """Claim once if there is room; False when the store had nothing suitable."""
        wanted = self._wanted()
        if not wanted:
            return True
        await self._link.check_clock()
        claimed = await self._link.call(
            self._store.claim_slices,
            self._name,
            self._boot_id,
            max_requests=wanted,
            lease_s=self._settings.lease_s,
            holding=len(self._table),
        )
        unsuitable = self._adopt(claimed)
        if unsuitable:
            models = sorted({lease.slice.model for lease in unsuitable})
            log.warning("slices of models not served here", models=models)
            await self._flusher.release(unsuitable, ReleaseReason.UNSUITABLE)
        return len(unsuitable) < len(claimed)

    def _wanted(self) -> int:
        """How many requests to claim now."""
        clogged = (
            self._table.buffered > MOST_BUFFERED_ROWS
            or self._table.buffered_bytes > MOST_BUFFERED_BYTES
        )
        if clogged or not self._claiming or self._residents.between:
            return 0
        return agent.pull_size(
            self._table.in_hand, self._residents.slots, suspect=self._table.suspect
        )

    def _adopt(self, claimed: Sequence[ClaimedSlice]) -> list[Lease]:
        """Hold claimed slices and feed them; returns those whose model is not served here."""
        unsuitable, held = [], []
        mono, now = time.monotonic(), self._link.now()
        for slice_ in claimed:
            lease = Lease(slice_, agent.engine_priority(slice_.deadline), mono)
            host = self._hosts.get(slice_.model)
            if host is None or host.residency is Residency.FAILED:
                unsuitable.append(lease)
                continue
            replaced = self._table.add(lease)
            if replaced is not None:
                replaced.cancel()
            self._expire(lease, now)
            self._flusher.adopted(lease)
            host.enqueue(lease)
            held.append(lease)
        if not self._claiming:
            # The claim was under way when the drain began.
            self._give_back(held)
        for host in self._engines:
            self._feeder.feed(host)
        return unsuitable

    # Outcomes

    def _settle(self, lease: Lease, row: ResultRow) -> None:
        if not self._table.settle(lease, row):
            return
        self._flusher.settled()
        # An instance that found nothing waits for a hint or the next poll.
        if not self._dry and self._table.in_hand < agent.PULL_BELOW * self._residents.slots:
            self._claim_now.set()

    def _flushed(self) -> None:
        if not len(self._table):
            # A suspect slice is only leased to an instance that holds nothing.
            self._claim_now.set()
            self._settled_all()

    def _settled_all(self) -> None:
        if self._state is InstanceState.DRAINING and self._all_done():
            self.end(Exit.OK)

    def _engine_died(self, host: Host, death: EngineDead) -> None:
        if self._verdict is None:
            log.error("engine died", model=host.model, error=death.message)
            self._suspects = frozenset(
                lease
                for lease in self._table.leases
                if lease.tasks and lease.slice.model in host.names
            )
            self.end(Exit.ENGINE_DIED)

    def _give_back(self, leases: Sequence[Lease]) -> None:
        """Return leases to the queue, no attempt counted, once their rows are stored."""
        for lease in leases:
            lease.preempted = True
            lease.cancel()
        self._flusher.review()

    def _expire(self, lease: Lease, now: float) -> None:
        for request in lease.take_expired(now):
            task = lease.tasks.get(request.position)
            if task is not None:
                task.cancel()
            self._settle(lease, rows.expired(lease.slice, request))

    # Watch

    async def _watch_forever(self) -> None:
        while self._verdict is None:
            await pause(self._over, WATCH_S)
            mono, now = time.monotonic(), self._link.now()
            for lease in self._table.leases:
                self._expire(lease, now)
            for host in self._residents.awake:
                self._look(host, mono)
            self._residents.look(mono)
            if mono >= self._drained_by:
                self.end(Exit.OK)

    def _look(self, host: Host, mono: float) -> None:
        try:
            host.look(mono)
        except EngineDead as death:
            self._engine_died(host, death)
            return
        if host.pace(mono, self._settings.interactive_tpot_s):
            self._feeder.feed(host)
        if host.stalled_s(mono) > self._settings.stall_s:
            log.error("engine hangs", model=host.model, inside=host.inside)
            self.end(Exit.ENGINE_HUNG)

    def _all_done(self) -> bool:
        serving = self._desk is not None and self._desk.running
        return not len(self._table) and not self._table.buffered and not serving

    @property
    def _shown(self) -> InstanceState:
        """The state the scheduler is told."""
        ready = self._state is InstanceState.READY
        return InstanceState.SWAPPING if ready and self._residents.between else self._state

    async def _beat_forever(self) -> None:
        failures = 0
        while self._verdict is None:
            wait_s = self._settings.heartbeat_s
            try:
                await self._link.check_clock()
                self._beat_now.clear()
                if not await self._reporter.beat(self._shown, self._phase or self._residents.phase):
                    log.error("a newer boot took this instance's name")
                    self.end(Exit.REPLACED)
                failures = 0
            except EngineDead:
                # The watch sees it too, and knows which engine it was.
                wait_s = WATCH_S
            except Exception as error:  # noqa: BLE001 - no fault of the store may end the work
                failures += 1
                self._link.failed("heartbeat", error, failures)
                wait_s = min(wait_s, backoff(failures))
            await pause(self._beat_now, wait_s)

    # The end

    async def _close(self, loops: Sequence[asyncio.Task[None]]) -> None:
        """Stop everything that runs, store what there is, and give leases back."""
        # Claims and flushes run in threads that cannot be interrupted: what they bring has to be
        # known before leases can be given back. What a silent store leaves open is let go: rows are
        # sent again, and a claim that succeeds all the same ends with the boot.
        _, hanging = await asyncio.wait(loops, timeout=LAST_FLUSH_S)
        for loop in hanging:
            loop.cancel()
        if hanging:
            await asyncio.wait(hanging, timeout=LAST_FLUSH_S)
        await self._residents.close()
        serving = [task for lease in self._table.leases for task in lease.tasks.values()]
        for task in serving:
            task.cancel()
        if self._desk is not None:
            await self._desk.close()
        if self._verdict is Exit.ENGINE_HUNG:
            await self._stop_engines()
        if serving:
            await asyncio.wait(serving, timeout=STOP_ENGINE_S)
        if self._verdict is not Exit.REPLACED:
            await self._last_words()
        if self._verdict is not Exit.ENGINE_HUNG:
            await self._stop_engines()
        self._link.close()

    async def _last_words(self) -> None:
        """Store all rows and give all leases back, for as long as that may take.

        A store that leaves one call without an answer for LAST_FLUSH_S is away.
        """
        failures, give_up_at = 0, time.monotonic() + LAST_FLUSH_S
        while True:
            try:
                while self._table.buffered:
                    async with asyncio.timeout(LAST_FLUSH_S):
                        await self._flusher.flush(renew=False)
                if self._verdict is not Exit.ENGINE_HUNG:
                    async with asyncio.timeout(LAST_FLUSH_S):
                        await self._release_all()
                        await self._link.call(self._store.retire, self._name, self._boot_id)
            except Exception as error:
                failures += 1
                self._link.failed("last flush", error, failures)
                if time.monotonic() < give_up_at:
                    await asyncio.sleep(backoff(failures))
                    continue
                log.exception("store stayed away; leases run out", rows=self._table.buffered)
            return

    async def _release_all(self) -> None:
        """Give all leases back: only what was inside a dead engine is to blame."""
        by_reason: defaultdict[ReleaseReason, list[Lease]] = defaultdict(list)
        for lease in self._table.leases:
            blamed = lease in self._suspects
            by_reason[ReleaseReason.ENGINE_DIED if blamed else ReleaseReason.SHUTDOWN].append(lease)
        for reason, leases in by_reason.items():
            await self._flusher.release(leases, reason)
            for lease in leases:
                self._table.drop(lease)

    async def _stop_engines(self) -> None:
        for host in self._engines:
            try:
                async with asyncio.timeout(STOP_ENGINE_S):
                    await host.engine.stop()
            except Exception:
                log.exception("engine did not stop in order", model=host.model)
