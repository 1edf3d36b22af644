"""Shares between tenants, a floor for batch work beside interactive, and ageing of late work.

Virtual token counters (Sheng et al., OSDI 2024): each tenant's time moves on with the tokens it was
served, forgotten by half every `HALF_LIFE_S`, and with the work it has queued. Where not everything
can be on time, groups of an early virtual time go first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qlm_batch.domain.jobs import OnMiss, SloClass
from qlm_batch.domain.snapshot import Observation, RequestGroup

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

HALF_LIFE_S = 900.0
FAIRNESS = 0.25
"""How much more the first work of a tenant weighs than its last, as a fraction."""
BATCH_FLOOR = 0.1
"""The share of the fleet's time that batch work keeps while interactive work wants all of it."""
LATE_WEIGHT = 0.25
"""What work finished late counts in the first window after its deadline; it doubles with each."""
LEAST_WINDOW_S = 60.0
_FORGOTTEN = 1e-3
_MOST_DOUBLINGS = 40


@dataclass(frozen=True, slots=True)
class Served:
    """Virtual tokens each tenant was served, as of `at`."""

    tokens: Mapping[str, float] = field(default_factory=dict)
    at: float = 0.0

    def after(self, observations: Iterable[Observation]) -> Served:
        """After these reports; a request counts its output tokens, at least one."""
        tokens, at = dict(self.tokens), self.at
        for seen in observations:
            if seen.outputs and seen.at > at:
                kept = 0.5 ** ((seen.at - at) / HALF_LIFE_S) if at > 0.0 else 1.0
                tokens = {name: n * kept for name, n in tokens.items() if n * kept > _FORGOTTEN}
                at = seen.at
            for ended in seen.outputs:
                tokens[ended.tenant] = tokens.get(ended.tenant, 0.0) + max(1, ended.tokens)
        return Served({name: round(n, 3) for name, n in sorted(tokens.items())}, at)

    def share(self, tenant: str, among: Iterable[str]) -> float:
        """The tenant's share of what these were served; 0 while nobody was."""
        total = sum(self.tokens.get(name, 0.0) for name in among)
        return self.tokens.get(tenant, 0.0) / total if total > 0.0 else 0.0

    def to_data(self) -> Mapping[str, object]:
        """As plain JSON values."""
        return {"tokens": dict(self.tokens), "at": self.at}

    @staticmethod
    def from_data(data: object) -> Served:
        """What `to_data` wrote; nothing served from anything else."""
        if not isinstance(data, Mapping) or not isinstance(data.get("tokens"), Mapping):
            return Served()
        tokens = {str(name): float(n) for name, n in data["tokens"].items()}
        return Served(tokens, float(data.get("at", 0.0)))


def virtual_times(
    groups: Sequence[RequestGroup], work_s: Sequence[float], served: Served
) -> Floats:
    """Each group's virtual time in [0, 2]: what its tenant had lately and queues up to its end.

    Both as shares of all. `work_s` is finite; groups stand in the order in which they are due.
    """
    index = {tenant: n for n, tenant in enumerate(sorted({group.tenant for group in groups}))}
    owner = np.array([index[group.tenant] for group in groups], dtype=np.int64)
    shares = np.array(work_s) / (sum(work_s) or 1.0)
    times = np.empty(len(groups))
    by_tenant = np.argsort(owner, kind="stable")
    bounds = np.searchsorted(owner[by_tenant], np.arange(len(index) + 1)).tolist()
    for tenant, start, stop in zip(index, bounds[:-1], bounds[1:], strict=True):
        own = by_tenant[start:stop]
        had = served.share(tenant, index)
        times[own] = np.cumsum(np.concatenate(([had], shares[own])))[1:]
    return times


def fair_factors(times: Floats, tenants: int) -> Floats:
    """What to multiply weights by; 1 while there is only one tenant."""
    if tenants < 2:
        return np.ones(times.size)
    factors: Floats = 1.0 + FAIRNESS * (1.0 - 0.5 * np.minimum(2.0, times))
    return factors


def entitled(times: Sequence[float], work_s: Sequence[float], capacity_s: float) -> Flags:
    """Whose work comes first where only `capacity_s` of it can be on time: the earliest times."""
    order = np.argsort(times, kind="stable")
    work = np.array(work_s)[order]
    left_s = np.subtract.accumulate(np.concatenate(([capacity_s], work)))[:-1]
    chosen = np.zeros(work.size, dtype=np.bool_)
    chosen[order[np.logical_and.accumulate(work <= left_s)]] = True
    return chosen


def on_floor(
    groups: Sequence[RequestGroup], work_s: Sequence[float], fleet: int, now: float
) -> Flags:
    """Batch groups inside the floor kept for their class; none without interactive work beside.

    The floor is a share of what `fleet` instances do until the last interactive deadline.
    """
    chosen = np.zeros(len(groups), dtype=np.bool_)
    urgent = [g.deadline - now for g in groups if g.slo_class is SloClass.INTERACTIVE]
    if not urgent:
        return chosen
    left_s = BATCH_FLOOR * fleet * max(0.0, *urgent)
    for n, (group, seconds) in enumerate(zip(groups, work_s, strict=True)):
        if group.slo_class is SloClass.BATCH and 0.0 < seconds <= left_s:
            left_s -= seconds
            chosen[n] = True
    return chosen


def aged(group: RequestGroup, now: float, needs_s: float) -> tuple[float, float]:
    """When a group is due, in seconds from now, and the factor of its weight.

    Work to be finished late whose deadline cannot be met is due a window later, at little weight;
    every window it is passed over doubles that, so that it is served in the end.
    """
    left_s = group.deadline - now
    if group.on_miss is not OnMiss.FINISH_LATE or needs_s <= left_s:
        return left_s, 1.0
    window_s = max(LEAST_WINDOW_S, group.deadline - group.arrived_at)
    # Twice its need at least, so that a group longer than its window is due at a time it can make.
    step_s = max(window_s, 2.0 * needs_s)
    passed = int(max(0.0, -left_s) // step_s) + 1
    return left_s + passed * step_s, LATE_WEIGHT * 2.0 ** min(_MOST_DOUBLINGS, passed - 1)
