"""Groups and instances as arrays, and schedules over them: what every policy works on.

Groups and instances are named by their index in the snapshot's order. Durations are seconds from
`now`. A group is on time when mean·(1 + z·e) + z·sqrt(var) of its completion is within its
deadline, z being the planning quantile and e the estimator's model error: linear in the mean and
subadditive in the variance, so a delay can be checked against a queue's slack in O(1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from qlm_batch.domain.jobs import SloClass
from qlm_batch.domain.snapshot import InstanceView, RequestGroup, Snapshot
from qlm_batch.scheduling.estimator import EstimatorConfig, GroupWork, Ready

Floats = NDArray[np.float64]

SWAP_PRICE: Final = 0.5
"""What a second of swapping costs beyond itself, in seconds of average work: plans change, and a
swap made for a plan that did not last is paid twice."""
CLASS_RANK: Final = {SloClass.INTERACTIVE: 0, SloClass.BATCH: 1}
_CLASS_FACTOR: Final = {SloClass.INTERACTIVE: 1e6, SloClass.BATCH: 1.0}
START: Final = -1
"""Stands for the model before a queue's first group."""


class Durations(Protocol):
    """What planning needs of an estimator."""

    config: EstimatorConfig

    def serves(self, instance: int, model: str) -> bool:
        """Whether the instance takes work of the model."""
        ...

    def work(self, group: RequestGroup) -> GroupWork:
        """A group's occupation and tail at every instance; inf where not served."""
        ...

    def ready(self, instance: int) -> Ready:
        """When a serving instance is free for new work."""
        ...

    def swap_s(self, instance: int, model: str) -> float:
        """Time to make a hosted model the awake one."""
        ...

    def drain_s(self, instance: int, model: str) -> float:
        """Time lost while a hosted model's running batch empties."""
        ...


Queues = list[list[int]]


@dataclass(frozen=True, slots=True)
class Score:
    """What a schedule is worth: weight on time, less the price of `swap_s` seconds of swapping."""

    on_time: float
    swap_s: float
    objective: float


@dataclass(frozen=True, slots=True)
class Walk:
    """A queue walked from its head: after each group the occupation's mean and variance, and when
    the group is done at the planning quantile; the seconds spent swapping."""

    ends: list[float]
    variances: list[float]
    done: list[float]
    swap_s: float


class Problem:
    """One planning problem; never changed once made."""

    def __init__(
        self, snapshot: Snapshot, groups: Sequence[RequestGroup], estimator: Durations
    ) -> None:
        self.now = snapshot.now
        self.groups = tuple(groups)
        self.instances: tuple[InstanceView, ...] = snapshot.instances
        g, m = len(self.groups), len(self.instances)
        self.models = sorted({group.model for group in self.groups})
        index = {model: k for k, model in enumerate(self.models)}
        self.model = [index[group.model] for group in self.groups]
        self.due = [group.deadline - self.now for group in self.groups]
        self.mean, self.var, self.tail = (np.full((g, m), np.inf) for _ in range(3))
        for row, group in enumerate(self.groups):
            work = estimator.work(group)
            self.mean[row], self.var[row], self.tail[row] = work.mean, work.var, work.tail
        self.least: list[float] = self.mean.min(axis=1, initial=math.inf).tolist()
        self.z = NormalDist().inv_cdf(estimator.config.quantile)
        self.inflation = 1.0 + self.z * estimator.config.model_error
        self.weight = self._weights()
        self._machines(estimator)
        known = {entry.group_key: entry.instance for entry in snapshot.queues}
        names = {view.name: i for i, view in enumerate(self.instances)}
        self.before = [names.get(known.get(group.key, ""), -1) for group in self.groups]
        work_s = sum(least for least in self.least if math.isfinite(least))
        reachable = sum(w for w, s in zip(self.weight, self.least, strict=True) if math.isfinite(s))
        self.density = reachable / work_s if work_s > 0.0 else 0.0

    def _weights(self) -> list[float]:
        """Every request of a class counts as much as its class's mean request takes."""
        work: dict[SloClass, float] = {}
        requests: dict[SloClass, int] = {}
        for group, least in zip(self.groups, self.least, strict=True):
            if math.isfinite(least):
                work[group.slo_class] = work.get(group.slo_class, 0.0) + least
                requests[group.slo_class] = requests.get(group.slo_class, 0) + group.requests
        each = {
            slo_class: _CLASS_FACTOR[slo_class] * total / max(1, requests[slo_class])
            for slo_class, total in work.items()
        }
        return [group.requests * each.get(group.slo_class, 0.0) for group in self.groups]

    def _machines(self, estimator: Durations) -> None:
        m, k = len(self.instances), len(self.models)
        self.serves = np.zeros((m, k), dtype=np.bool_)
        self.awake = np.zeros((m, k), dtype=np.bool_)
        self.ready, self.ready_var = np.full(m, np.inf), np.zeros(m)
        # setup[i, a, b] is the time lost at i between work of a and of b; a = START is the last.
        self.setup = np.full((m, k + 1, k), np.inf)
        for i in range(m):
            self.serves[i] = [estimator.serves(i, model) for model in self.models]
            if not self.serves[i].any():
                continue
            ready = estimator.ready(i)
            self.ready[i], self.ready_var[i] = ready.mean, ready.var
            self.awake[i] = [model in ready.awake for model in self.models]
            for b in np.flatnonzero(self.serves[i]):
                swap_s = estimator.swap_s(i, self.models[b])
                self.setup[i, START, b] = 0.0 if self.awake[i, b] else swap_s
                for a in np.flatnonzero(self.serves[i]):
                    together = a == b or (self.awake[i, a] and self.awake[i, b])
                    lost_s = swap_s + estimator.drain_s(i, self.models[a])
                    self.setup[i, a, b] = 0.0 if together else lost_s

    @property
    def empty(self) -> Queues:
        """A queue without groups for every instance."""
        return [[] for _ in self.instances]

    def placeable(self, group: int) -> bool:
        """Whether any instance serves the group's model."""
        return math.isfinite(self.least[group])

    def done(self, mean: float, var: float) -> float:
        """When something of this mean and variance is done, at the planning quantile."""
        return mean * self.inflation + self.z * math.sqrt(var)

    def walk(self, instance: int, queue: Sequence[int]) -> Walk:
        """Times along a queue whose groups the instance all serves."""
        end, var = float(self.ready[instance]), float(self.ready_var[instance])
        setup, swap_s, last = self.setup[instance], 0.0, START
        walk = Walk([], [], [], 0.0)
        for g in queue:
            k = self.model[g]
            if k != last:
                lost = float(setup[last, k])
                swap_s += lost
                end += lost
                last = k
            end += float(self.mean[g, instance])
            var += float(self.var[g, instance])
            walk.ends.append(end)
            walk.variances.append(var)
            walk.done.append(self.done(end + float(self.tail[g, instance]), var))
        return Walk(walk.ends, walk.variances, walk.done, swap_s)

    def slack(self, queue: Sequence[int], walk: Walk) -> list[float]:
        """For each position, how much everything from there on may be delayed; inf at the end."""
        slack = [math.inf] * (len(queue) + 1)
        for p in range(len(queue) - 1, -1, -1):
            slack[p] = min(slack[p + 1], self.due[queue[p]] - walk.done[p])
        return slack

    def score(self, queues: Queues) -> Score:
        """What these queues are worth, groups that are late counting nothing."""
        made: list[float] = []
        swap_s = 0.0
        for i, queue in enumerate(queues):
            if queue:
                walk = self.walk(i, queue)
                swap_s += walk.swap_s
                for g, done in zip(queue, walk.done, strict=True):
                    if done <= self.due[g]:
                        made.append(self.weight[g])
        # Exact, so that equal sets of groups are worth the same in any order.
        on_time = math.fsum(made)
        return Score(on_time, swap_s, on_time - self.price(swap_s))

    def price(self, swap_s: float) -> float:
        """What so much swapping costs beyond the time it takes, in weight."""
        return SWAP_PRICE * swap_s * self.density
