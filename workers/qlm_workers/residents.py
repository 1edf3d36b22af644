"""Which models of this instance are awake, and how one takes the place of another."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence

import structlog

from qlm_batch.domain.errors import QlmError
from qlm_batch.domain.snapshot import ModelView, Residency
from qlm_batch.scheduling import swapping
from qlm_batch.scheduling.swapping import Change, Hosted, Parting
from qlm_batch.settings import Settings
from qlm_workers.hosts import Host
from qlm_workers.leases import Lease, LeaseTable

log = structlog.get_logger(__name__)

UNKNOWN_SWAP_S = 30.0
"""Assumed until a model was loaded here."""
LOOK_S = 0.05


class Residents:
    """The hosts of one instance, of which `room` may be awake. All methods belong to its loop.

    `opened` is told when requests may go inside a host again, `give_back` when leases are to return
    to the queue, `changed` of every change of residency or phase, and `lost` when no model can be
    made awake any more.
    """

    def __init__(
        self,
        hosts: Sequence[Host],
        table: LeaseTable,
        settings: Settings,
        *,
        opened: Callable[[Host], None],
        give_back: Callable[[Sequence[Lease]], None],
        changed: Callable[[], None],
        lost: Callable[[], None],
    ) -> None:
        self._hosts = hosts
        self._table = table
        self._settings = settings
        self._opened, self._give_back = opened, give_back
        self._changed, self._lost = changed, lost
        self.room = min(len(hosts), settings.models_awake or len(hosts))
        self.phase = ""
        self._slots, self._kv_tokens = settings.slots, 0
        self._task: asyncio.Task[None] | None = None
        self._retired = False
        self._coming: Host | None = None
        self._began = 0.0
        self._failed: dict[Host, float] = {}

    # What is so

    @property
    def first(self) -> list[Host]:
        """The hosts that are awake at the start."""
        return list(self._hosts[: self.room])

    @property
    def awake(self) -> list[Host]:
        """The hosts whose engines run."""
        return [host for host in self._hosts if host.residency is Residency.AWAKE]

    @property
    def slots(self) -> int:
        """What can run at once; during a swap what could before."""
        self._slots = sum(host.info.slots for host in self.awake if host.info) or self._slots
        return self._slots

    @property
    def kv_tokens(self) -> int:
        """Key-value tokens; during a swap those before."""
        fits = sum(host.info.kv_tokens for host in self.awake if host.info)
        self._kv_tokens = fits or self._kv_tokens
        return self._kv_tokens

    @property
    def between(self) -> bool:
        """Whether a swap leaves no model that takes requests just now."""
        return self._task is not None and not any(host.open for host in self._hosts)

    def views(self) -> tuple[ModelView, ...]:
        """The models as the scheduler sees them."""
        now = time.monotonic()
        hosted = self._hosted(now)
        return tuple(
            view
            for host in self._hosts
            for view in host.views(
                self._wake_s(host, now), swapping.stay_s(hosted, host.model, self.room)
            )
        )

    def _wake_s(self, host: Host, now: float) -> float | None:
        """From where it is to awake, with what has to leave for it; the rest while under way."""
        arrive_s = host.times.arrive_s(host.residency)
        if arrive_s is None:
            loads = [own.times.load_s for own in self._hosts if own.times.load_s]
            if not loads:
                return None
            arrive_s = max(loads)
        leave_s = 0.0
        if len(self._hosts) > self.room:
            others = [own.times.sleep_s for own in self._hosts if own is not host]
            leave_s = max(others, default=0.0)
        if host is self._coming:
            return max(0.1, leave_s + arrive_s - (now - self._began))
        return leave_s + arrive_s

    # Swapping

    def look(self, now: float) -> None:
        """Begin the swap the rule asks for; call it often."""
        self._forgive(now)
        if self._retired or self._task is not None or len(self._hosts) <= self.room:
            return
        change = swapping.next_change(self._hosted(now), self.room)
        if change is not None:
            self._task = asyncio.create_task(self._swap(change))

    def retire(self) -> list[Lease]:
        """Begin no more swaps; the leases that would have needed one."""
        self._retired = True
        waiting = [host for host in self._hosts if host.residency is not Residency.AWAKE]
        return [lease for host in waiting for lease in self._leases(host)]

    async def close(self) -> None:
        """Stop where a swap stands."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _hosted(self, now: float) -> list[Hosted]:
        due: dict[str, float] = {}
        held: Counter[str] = Counter()
        for lease in self._table.leases:
            if lease.open and not lease.preempted:
                model = lease.slice.model
                due[model] = min(due.get(model, math.inf), lease.slice.deadline)
                held[model] += len(lease.open)
        found = []
        for host in self._hosts:
            if host.residency is Residency.FAILED:
                continue
            awake = host.residency is Residency.AWAKE
            swap_s = self._wake_s(host, now)
            found.append(
                Hosted(
                    model=host.model,
                    awake_s=now - host.awake_since if awake else None,
                    swap_s=UNKNOWN_SWAP_S if swap_s is None else swap_s,
                    due=min(due.get(name, math.inf) for name in host.names),
                    calls=host.interactive + host.parked,
                    left_s=host.left_s(),
                    share=sum(held[name] for name in host.names) / max(1, self.slots),
                )
            )
        return found

    async def _swap(self, change: Change) -> None:
        by_name = {host.model: host for host in self._hosts}
        coming = by_name[change.wakes]
        leaving = None if change.sleeps is None else by_name[change.sleeps]
        log.info("swapping", wakes=change.wakes, sleeps=change.sleeps, parting=change.parting)
        try:
            if leaving is not None:
                self._tell(f"emptying {leaving.model} for {coming.model}")
                await self._empty(leaving, change)
            self._coming, self._began = coming, time.monotonic()
            if leaving is not None:
                await self._put_to_sleep(leaving)
            if not await self._wake(coming):
                self._give_up(coming)
                await self._back_to(leaving)
        except Exception:
            log.exception("swap failed", wakes=change.wakes)
            self._lost()
        finally:
            self._coming = None
            self._task = None
            self._tell("")

    async def _empty(self, leaving: Host, change: Change) -> None:
        """Let what is inside end or wait, and return what is not to the queue."""
        leaving.close()
        keeps = leaving.info is not None and leaving.info.keeps_asleep
        if change.parting is Parting.DRAIN:
            await _until(lambda: not leaving.inside, change.drain_s)
        self._release(leaving, keeps=keeps)
        await _until(lambda: not leaving.interactive and (keeps or not leaving.inside))

    async def _put_to_sleep(self, leaving: Host) -> None:
        self._tell(f"putting {leaving.model} to sleep")
        began = time.monotonic()
        leaving.left(Residency.ASLEEP)
        try:
            async with asyncio.timeout(self._settings.swap_timeout_s):
                residency = await leaving.engine.sleep()
        except Exception as fault:  # noqa: BLE001 - an engine that will not sleep is ended
            log.warning("engine did not sleep", model=leaving.model, **_told(fault))
            await self._end(leaving)
            residency = Residency.COLD
        # What was claimed while it emptied; where a drain began meanwhile nothing wakes it again.
        self._release(leaving, keeps=residency is Residency.ASLEEP and not self._retired)
        leaving.left(residency, time.monotonic() - began)

    async def _wake(self, coming: Host) -> bool:
        """Make it awake, trying again where that fails; whether it is."""
        attempts = 0
        while True:
            attempts += 1
            self._tell(f"waking {coming.model}")
            began = time.monotonic()
            try:
                async with asyncio.timeout(self._settings.swap_timeout_s):
                    info = await coming.engine.wake()
            except Exception as fault:  # noqa: BLE001 - whatever it is, the engine is not there
                log.warning(
                    "engine did not wake", model=coming.model, tries=attempts, **_told(fault)
                )
                await self._end(coming)
                coming.left(Residency.COLD)
                coming.fault = str(fault) or type(fault).__name__
                delay = swapping.retry_delay(attempts)
                if delay is None:
                    return False
                await asyncio.sleep(delay)
                continue
            now = time.monotonic()
            coming.started(info, now, now - began)
            coming.awake_since = now
            coming.swaps += 1
            coming.swapped_s += now - self._began
            log.info("swapped", model=coming.model, seconds=round(now - self._began, 2))
            self._opened(coming)
            return True

    def _give_up(self, coming: Host) -> None:
        """Let the work be planned elsewhere for a while."""
        log.error("model failed here", model=coming.model, retry_s=swapping.FAILED_FOR_S)
        self._failed[coming] = time.monotonic() + swapping.FAILED_FOR_S
        coming.left(Residency.FAILED)
        self._release(coming)

    async def _back_to(self, leaving: Host | None) -> None:
        """Wake what made room in vain."""
        if leaving is None:
            return
        self._coming = leaving
        if not await self._wake(leaving) and not self.awake:
            raise QlmError(f"Neither model can be made awake; '{leaving.model}' was before.")

    def _forgive(self, now: float) -> None:
        for host, until in list(self._failed.items()):
            if now >= until:
                del self._failed[host]
                host.left(Residency.COLD)

    def _tell(self, phase: str) -> None:
        self.phase = phase
        self._changed()

    async def _end(self, host: Host) -> None:
        """End the engine; what it kept inside goes back to the queue, blamed for nothing."""
        if host.inside:
            self._release(host)
            await _until(lambda: not host.inside, self._settings.swap_timeout_s)
        await host.engine.stop()

    def _release(self, host: Host, *, keeps: bool = False) -> None:
        """Return the model's leases to the queue, but those with requests the engine keeps."""
        held = self._leases(host)
        self._give_back([lease for lease in held if not (keeps and lease.tasks)])

    def _leases(self, host: Host) -> list[Lease]:
        return [lease for lease in self._table.leases if lease.slice.model in host.names]


async def _until(condition: Callable[[], bool], within_s: float = math.inf) -> None:
    ends_at = time.monotonic() + within_s
    while not condition() and time.monotonic() < ends_at:  # noqa: ASYNC110 - plain counters
        await asyncio.sleep(LOOK_S)


def _told(fault: BaseException) -> dict[str, object]:
    known = isinstance(fault, QlmError | TimeoutError)
    return {"error": str(fault) or type(fault).__name__, "exc_info": None if known else fault}
