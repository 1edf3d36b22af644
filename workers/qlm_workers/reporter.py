"""Heartbeats: what an instance tells about itself."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from qlm_batch.domain.ports import Heartbeat
from qlm_batch.domain.snapshot import InstanceState, Observation
from qlm_batch.scheduling import agent
from qlm_workers.hosts import Host
from qlm_workers.link import Link

MOST_REPORTS = 64
"""Observations kept while the store is away; the oldest go first."""
MOST_GENERATED = 512


class Reporter:
    """Sends heartbeats; observations stay here until one has arrived."""

    def __init__(
        self, link: Link, hosts: Sequence[Host], *, name: str, boot_id: str, device: str, slots: int
    ) -> None:
        self._link = link
        self._hosts = hosts
        self._name, self._boot_id, self._device = name, boot_id, device
        self._slots = slots
        self._share, self._shared_at = 0.0, time.monotonic()
        self._reports: deque[Observation] = deque(maxlen=MOST_REPORTS)

    async def beat(self, state: InstanceState, phase: str) -> bool:
        """Report once; False when another boot has this name.

        Raises as the store does, and EngineDead.
        """
        now = self._link.now()
        mono = time.monotonic()
        for host in self._hosts:
            if host.info is None:
                continue
            # Without a fresh look the tokens of requests that just finished would count twice.
            host.look(mono)
            if (seen := host.meter.report(now)) is not None:
                self._reports.append(seen)
        reports = tuple(self._reports)
        self._share_until(mono)
        beat = self._heartbeat(state, phase, reports)
        alive = await self._link.call(self._link.store.heartbeat, beat)
        for _ in reports:
            self._reports.popleft()
        return alive

    def _share_until(self, now: float) -> None:
        """Fold in the interactive requests inside since the last report."""
        interactive = sum(host.interactive for host in self._hosts)
        seconds, self._shared_at = now - self._shared_at, now
        self._share = agent.interactive_share(self._share, interactive, self._all_slots(), seconds)

    def _all_slots(self) -> int:
        infos = [host.info for host in self._hosts if host.info is not None]
        return sum(info.slots for info in infos) or self._slots

    def _heartbeat(
        self, state: InstanceState, phase: str, reports: tuple[Observation, ...]
    ) -> Heartbeat:
        infos = [host.info for host in self._hosts if host.info is not None]
        stats = [host.stats for host in self._hosts if host.stats is not None]
        return Heartbeat(
            name=self._name,
            boot_id=self._boot_id,
            device=self._device,
            state=state,
            models=tuple(host.view() for host in self._hosts),
            slots=self._all_slots(),
            kv_tokens=sum(info.kv_tokens for info in infos),
            running=sum(host.inside + host.interactive for host in self._hosts),
            interactive_running=sum(host.interactive for host in self._hosts),
            batch_cap=sum(host.cap for host in self._hosts),
            evictions=sum(seen.evictions for seen in stats),
            recomputed_tokens=sum(seen.recomputed_tokens for seen in stats),
            output_tokens=sum(seen.generated_tokens for seen in stats),
            kv_usage=_kv_usage(self._hosts),
            generated=tuple(n for s in stats for n in s.generated)[:MOST_GENERATED],
            tokens_per_s=sum(host.meter.tokens_per_s for host in self._hosts),
            interactive_share=self._share,
            phase=phase,
            observations=reports,
        )


def _kv_usage(hosts: Sequence[Host]) -> float:
    """The share in use of all engines' key-value caches together."""
    told = [(host.stats, host.info) for host in hosts]
    used = sum(s.kv_usage * i.kv_tokens for s, i in told if s is not None and i is not None)
    return used / (sum(i.kv_tokens for _, i in told if i is not None) or 1)
