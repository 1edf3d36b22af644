"""Groups and instances as arrays, and schedules over them: what every policy works on.

Groups and instances are named by their index in the snapshot's order. Durations are seconds from
`now`. A group is on time when mean·(1 + z·e) + z·sqrt(var) of its completion is within its
deadline, z being the planning quantile and e the estimator's model error: linear in the mean and
subadditive in the variance, so a delay can be checked against a queue's slack in O(1).

A group's completion is when most of its last requests have ended: to wait for the longest would let
a whole group go for the sake of a few. What is late is worth the share of it that is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from statistics import NormalDist
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from qlm_batch.domain.jobs import SloClass
from qlm_batch.domain.snapshot import InstanceView, RequestGroup, Snapshot
from qlm_batch.scheduling.estimator import EstimatorConfig, Ready
from qlm_batch.scheduling.fairness import Served, aged, fair_factors, on_floor, virtual_times
from qlm_batch.scheduling.kernels import Columns, Ints
from qlm_batch.scheduling.loops import loops
from qlm_batch.scheduling.worktable import WorkTable

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

SWAP_PRICE: Final = 0.5
"""What a second of swapping costs beyond itself, in seconds of average work: plans change, and a
swap made for a plan that did not last is paid twice."""
CLASS_RANK: Final = {SloClass.INTERACTIVE: 0, SloClass.BATCH: 1}
_CLASS_FACTOR: Final = {SloClass.INTERACTIVE: 1e6, SloClass.BATCH: 1.0}
_FLOOR_FACTOR: Final = 2e6
MOST: Final = 5
"""Which of a request's equally likely ends counts as a group's: 5 of 8 are sooner."""
_LEAST_S: Final = 1e-9
START: Final = -1
"""Stands for the model before a queue's first group."""


class Durations(Protocol):
    """What planning needs of an estimator."""

    @property
    def config(self) -> EstimatorConfig:
        """Its settings."""
        ...

    @property
    def served(self) -> Served:
        """What tenants were served lately."""
        ...

    def serves(self, instance: int, model: str) -> bool:
        """Whether the instance takes work of the model."""
        ...

    def table(self, groups: Sequence[RequestGroup]) -> WorkTable:
        """What these groups take at every instance; inf where not served."""
        ...

    def expected_tokens(self, group: RequestGroup) -> float:
        """The output tokens the group's requests are expected to have in all."""
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


@dataclass(frozen=True, slots=True, eq=False)
class Times:
    """Times of all queues end to end: queue i is `flat[bounds[i] : bounds[i + 1]]`.

    Per group its start, its occupation's end as mean and variance, and when it is done at the
    planning quantile; per instance the seconds spent swapping.
    """

    flat: Ints
    bounds: Ints
    starts: Floats
    ends: Floats
    variances: Floats
    done: Floats
    swap_s: Floats


class Problem:
    """One planning problem; never changed once made."""

    def __init__(
        self, snapshot: Snapshot, groups: Sequence[RequestGroup], estimator: Durations
    ) -> None:
        self.now = snapshot.now
        self.groups = tuple(groups)
        self.instances: tuple[InstanceView, ...] = snapshot.instances
        self.models = sorted({group.model for group in self.groups})
        index = {model: k for k, model in enumerate(self.models)}
        self.model = [index[group.model] for group in self.groups]
        self.table = estimator.table(self.groups)
        self._kind: list[int] = self.table.kind.tolist()
        self._count: list[float] = self.table.count.tolist()
        self._tails: Floats = self.table.end(MOST)
        least = self.table.mean.min(axis=1, initial=math.inf)[self.table.kind] * self.table.count
        self.able: Flags = np.isfinite(least)
        """Groups that some instance serves."""
        self.least: list[float] = least.tolist()
        self.z = NormalDist().inv_cdf(estimator.config.quantile)
        self.model_error = estimator.config.model_error
        self.inflation = 1.0 + self.z * self.model_error
        self._machines(estimator)
        work_s: list[float] = np.where(self.able, least, 0.0).tolist()
        self._worth(estimator.served, work_s)
        self.before = [-1] * len(self.groups)
        if snapshot.queues:
            known = {entry.group_key: entry.instance for entry in snapshot.queues}
            names = {view.name: i for i, view in enumerate(self.instances)}
            self.before = [names.get(known.get(group.key, ""), -1) for group in self.groups]
        total_s = sum(work_s)
        reachable = sum(np.array(self.weight)[self.able].tolist())
        self.density = reachable / total_s if total_s > 0.0 else 0.0

    def _worth(self, served: Served, work_s: Sequence[float]) -> None:
        """Due times and weights: a request counts what its class's mean request takes, by shares.

        `virtual` are virtual times; see `fairness`.
        """
        groups, now = self.groups, self.now
        deadlines = np.array([group.deadline for group in groups], dtype=np.float64)
        tenants = len({group.tenant for group in groups})
        virtual = np.zeros(len(groups))
        if tenants > 1:
            order = np.argsort(deadlines, kind="stable")
            placed = order.tolist()
            ordered = [groups[g] for g in placed]
            virtual[order] = virtual_times(ordered, [work_s[g] for g in placed], served)
        self.virtual: list[float] = virtual.tolist()
        fleet = int(np.isfinite(self.ready).sum())
        self.floor = on_floor(groups, work_s, fleet, now)
        requests = np.array([group.requests for group in groups], dtype=np.float64)
        self.lines = np.maximum(1.0, requests)
        """The requests of each group, at least one."""
        classes = [group.slo_class for group in groups]
        needs = np.array(work_s)
        each, factor = np.zeros(len(groups)), np.ones(len(groups))
        for slo_class in set(classes):
            own = np.array([other is slo_class for other in classes])
            some = own & (needs > 0.0)
            each[own] = sum(needs[some].tolist()) / max(1.0, requests[some].sum())
            factor[own] = _CLASS_FACTOR[slo_class]
        factor[self.floor] = _FLOOR_FACTOR
        weight = requests * each * factor * fair_factors(virtual, tenants)
        due = deadlines - now
        for g in np.flatnonzero(needs > due).tolist():
            due[g], age = aged(groups[g], now, work_s[g])
            weight[g] *= age
        self.due: list[float] = due.tolist()
        self.weight: list[float] = weight.tolist()

    def _machines(self, estimator: Durations) -> None:
        m, k = len(self.instances), len(self.models)
        self.serves: Flags = np.array(
            [[estimator.serves(i, model) for model in self.models] for i in range(m)],
            dtype=np.bool_,
        ).reshape(m, k)
        self.awake: Flags = np.zeros((m, k), dtype=np.bool_)
        self.ready, self.ready_var = np.full(m, np.inf), np.zeros(m)
        swap_s, drain_s = np.full((m, k), np.inf), np.full((m, k), np.inf)
        roots: dict[str, int] = {}
        root = np.full((m, k), -1)
        for i, (view, served) in enumerate(zip(self.instances, self.serves.tolist(), strict=True)):
            if not any(served):
                continue
            ready = estimator.ready(i)
            self.ready[i], self.ready_var[i] = ready.mean, ready.var
            of = {model.name: model.root for model in view.models}
            for b, (model, serves) in enumerate(zip(self.models, served, strict=True)):
                self.awake[i, b] = model in ready.awake
                if serves:
                    swap_s[i, b] = estimator.swap_s(i, model)
                    drain_s[i, b] = estimator.drain_s(i, model)
                    root[i, b] = roots.setdefault(of.get(model, model), len(roots))
        # setup[i, a, b] is the time lost at i between work of a and of b; a = START is the last.
        self.setup = np.full((m, k + 1, k), np.inf)
        together = self.awake[:, :, None] & self.awake[:, None, :]
        together |= root[:, :, None] == root[:, None, :]
        lost = np.where(together, 0.0, swap_s[:, None, :] + drain_s[:, :, None])
        served_both = self.serves[:, :, None] & self.serves[:, None, :]
        self.setup[:, :START] = np.where(served_both, lost, np.inf)
        self.setup[:, START] = np.where(self.awake & self.serves, 0.0, swap_s)

    @cached_property
    def columns(self) -> Columns:
        """The same as arrays, for the compiled loops."""
        table = self.table
        return Columns(
            model=np.array(self.model, dtype=np.int64),
            due=np.array(self.due, dtype=np.float64),
            weight=np.array(self.weight, dtype=np.float64),
            kind=table.kind,
            amount=table.count,
            mean=table.mean,
            var=table.var,
            tails=self._tails,
            before=np.array(self.before, dtype=np.int64),
            serves=self.serves,
            awake=self.awake,
            ready=self.ready,
            ready_var=self.ready_var,
            setup=self.setup,
            z=self.z,
            inflation=self.inflation,
        )

    @property
    def empty(self) -> Queues:
        """A queue without groups for every instance."""
        return [[] for _ in self.instances]

    def mean(self, group: int, instance: int) -> float:
        """The mean of a group's occupation of an instance; inf where not served."""
        return float(self.table.mean[self._kind[group], instance]) * self._count[group]

    def var(self, group: int, instance: int) -> float:
        """Its variance."""
        return float(self.table.var[self._kind[group], instance]) * self._count[group]

    def tail(self, group: int, instance: int) -> float:
        """How much later than its occupation most of its last requests have ended."""
        return float(self._tails[self._kind[group], instance])

    def placeable(self, group: int) -> bool:
        """Whether any instance serves the group's model."""
        return math.isfinite(self.least[group])

    def in_order(self, ranks: Sequence[object]) -> Ints:
        """Placeable groups by ascending rank, equal ones as they stand."""
        able: list[int] = np.flatnonzero(self.able).tolist()
        able.sort(key=ranks.__getitem__)  # type: ignore[arg-type]
        return np.array(able, dtype=np.int64)

    @cached_property
    def by_deadline(self) -> Ints:
        """Placeable groups, earliest deadline first; of equal ones the tenant's that had less."""
        arrived = np.array([group.arrived_at for group in self.groups])
        order = np.lexsort((arrived, np.array(self.virtual), self.columns.due))
        able: Ints = order[self.able[order]]
        return able

    @cached_property
    def rank(self) -> Ints:
        """Each placeable group's position in `by_deadline`."""
        order = self.by_deadline
        rank = np.zeros(len(self.groups), dtype=np.int64)
        rank[order] = np.arange(order.size)
        return rank

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
            end += self.mean(g, instance)
            var += self.var(g, instance)
            walk.ends.append(end)
            walk.variances.append(var)
            walk.done.append(self.done(end + self.tail(g, instance), var))
        return Walk(walk.ends, walk.variances, walk.done, swap_s)

    def slack(self, queue: Sequence[int], walk: Walk) -> list[float]:
        """For each position, how much everything from there on may be delayed; inf at the end."""
        slack = [math.inf] * (len(queue) + 1)
        for p in range(len(queue) - 1, -1, -1):
            slack[p] = min(slack[p + 1], self.due[queue[p]] - walk.done[p])
        return slack

    def laid_out(self, queues: Queues) -> tuple[Ints, Ints]:
        """All queues end to end, and where each begins and the last one ends."""
        bounds = np.zeros(len(queues) + 1, dtype=np.int64)
        np.cumsum([len(queue) for queue in queues], out=bounds[1:])
        flat = np.fromiter(chain.from_iterable(queues), np.int64, int(bounds[-1]))
        return flat, bounds

    def times(self, queues: Queues) -> Times:
        """Times along all queues at once."""
        flat, bounds = self.laid_out(queues)
        return Times(flat, bounds, *loops().walk_all(self.columns, flat, bounds))

    def shares(self, times: Times) -> Floats:
        """For each of these groups the share of its requests expected to be on time, 1 if it is.

        Its requests end evenly over its occupation, each later or sooner by its own length.
        """
        due = self.columns.due[times.flat]
        shares = np.ones(times.flat.size)
        late = np.flatnonzero(times.done > due)
        if late.size:
            owner = np.repeat(np.arange(times.bounds.size - 1), np.diff(times.bounds))[late]
            group = times.flat[late]
            span = (times.ends[late] - times.starts[late]) * self.inflation
            start = times.starts[late] * self.inflation + self.z * np.sqrt(times.variances[late])
            room = (due[late] - start)[:, None] - self.table.ends(group, owner)
            part = np.clip(room / np.maximum(span, _LEAST_S)[:, None], 0.0, 1.0)
            lines = self.lines[group][:, None]
            shares[late] = (np.floor(part * lines) / lines).mean(axis=1)
        return shares

    def score(self, queues: Queues) -> Score:
        """What these queues are worth, groups that are late counting what of them is not."""
        times = self.times(queues)
        swap_s = math.fsum(times.swap_s)
        # Exact, so that equal sets of groups are worth the same in any order.
        on_time = math.fsum(self.columns.weight[times.flat] * self.shares(times))
        return Score(on_time, swap_s, on_time - self.price(swap_s))

    def price(self, swap_s: float) -> float:
        """What so much swapping costs beyond the time it takes, in weight."""
        return SWAP_PRICE * swap_s * self.density
