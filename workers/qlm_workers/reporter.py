"""Heartbeats: what an instance tells about itself."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from qlm_batch.domain.jobs import SloClass
from qlm_batch.domain.records import Heartbeat
from qlm_batch.domain.snapshot import InstanceState, Latency, Observation, Residency
from qlm_batch.scheduling import agent
from qlm_workers.hosts import Host
from qlm_workers.link import Link
from qlm_workers.residents import Residents

MOST_REPORTS = 64
"""Observations kept while the store is away; the oldest go first."""
MOST_GENERATED = 512


class Reporter:
    """Sends heartbeats; observations stay here until one has arrived."""

    def __init__(
        self,
        link: Link,
        hosts: Sequence[Host],
        residents: Residents,
        *,
        name: str,
        boot_id: str,
        device: str,
    ) -> None:
        self._link = link
        self._hosts = hosts
        self._name, self._boot_id, self._device = name, boot_id, device
        self._residents = residents
        self._share, self._shared_at = 0.0, time.monotonic()
        self._reports: deque[Observation] = deque(maxlen=MOST_REPORTS)

    async def beat(self, state: InstanceState, phase: str) -> bool:
        """Report once; False when another boot has this name.

        Raises as the store does, and EngineDead.
        """
        now = self._link.now()
        mono = time.monotonic()
        for host in self._hosts:
            if host.residency is not Residency.AWAKE:
                continue
            # Without a fresh look the tokens of requests that just finished would count twice.
            host.look(mono)
            for meter in (host.meter, *host.adapters.values()):
                if (seen := meter.report(now)) is not None:
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
        self._share = agent.interactive_share(
            self._share, interactive, self._residents.slots, seconds
        )

    def _heartbeat(
        self, state: InstanceState, phase: str, reports: tuple[Observation, ...]
    ) -> Heartbeat:
        awake = self._residents.awake
        stats = [host.stats for host in self._hosts if host.stats is not None]
        return Heartbeat(
            name=self._name,
            boot_id=self._boot_id,
            device=self._device,
            state=state,
            models=self._residents.views(),
            slots=self._residents.slots,
            kv_tokens=self._residents.kv_tokens,
            running=sum(host.inside + host.interactive for host in self._hosts),
            interactive_running=sum(host.interactive + host.parked for host in self._hosts),
            batch_cap=sum(host.cap for host in awake),
            evictions=sum(host.totals.evictions for host in self._hosts),
            recomputed_tokens=sum(host.totals.recomputed_tokens for host in self._hosts),
            output_tokens=sum(host.totals.generated_tokens for host in self._hosts),
            kv_usage=_kv_usage(awake),
            latencies=tuple(_latency(self._hosts, each) for each in SloClass),
            generated=tuple(n for s in stats for n in s.generated)[:MOST_GENERATED],
            tokens_per_s=sum(host.meter.tokens_per_s for host in self._hosts),
            interactive_share=self._share,
            phase=phase,
            observations=reports,
        )


def _latency(hosts: Sequence[Host], slo_class: SloClass) -> Latency:
    """One class over all engines."""
    own = [host.latencies[slo_class] for host in hosts]
    return Latency(
        slo_class,
        sum(each.requests for each in own),
        sum(each.first_s for each in own),
        sum(each.tokens for each in own),
        sum(each.tokens_s for each in own),
    )


def _kv_usage(hosts: Sequence[Host]) -> float:
    """The share in use of all engines' key-value caches together."""
    told = [(host.stats, host.info) for host in hosts]
    used = sum(s.kv_usage * i.kv_tokens for s, i in told if s is not None and i is not None)
    return used / (sum(i.kv_tokens for _, i in told if i is not None) or 1)
