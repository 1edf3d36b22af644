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
        fastest = self.table.mean.min(axis=1, initial=math.inf)
        self.least: list[float] = (fastest[self.table.kind] * self.table.count).tolist()
        self.z = NormalDist().inv_cdf(estimator.config.quantile)
        self.model_error = estimator.config.model_error
        self.inflation = 1.0 + self.z * self.model_error
        self._machines(estimator)
        self._worth(estimator.served)
        known = {entry.group_key: entry.instance for entry in snapshot.queues}
        names = {view.name: i for i, view in enumerate(self.instances)}
        self.before = [names.get(known.get(group.key, ""), -1) for group in self.groups]
        work_s = sum(least for least in self.least if math.isfinite(least))
        reachable = sum(w for w, s in zip(self.weight, self.least, strict=True) if math.isfinite(s))
        self.density = reachable / work_s if work_s > 0.0 else 0.0

    def _worth(self, served: Served) -> None:
        """Due times and weights: a request counts what its class's mean request takes, by shares.

        `virtual` are virtual times; see `fairness`.
        """
        finite = [least if math.isfinite(least) else 0.0 for least in self.least]
        tenants = len({group.tenant for group in self.groups})
        if tenants > 1:
            order = sorted(range(len(finite)), key=lambda g: (self.groups[g].deadline, g))
            ordered = [self.groups[g] for g in order]
            times = virtual_times(ordered, [finite[g] for g in order], served)
            self.virtual = [t for _, t in sorted(zip(order, times, strict=True))]
        else:
            self.virtual = [0.0] * len(finite)
        work: dict[SloClass, float] = {}
        requests: dict[SloClass, int] = {}
        for group, least in zip(self.groups, finite, strict=True):
            if least > 0.0:
                work[group.slo_class] = work.get(group.slo_class, 0.0) + least
                requests[group.slo_class] = requests.get(group.slo_class, 0) + group.requests
        each = {slo: total / max(1, requests[slo]) for slo, total in work.items()}
        fleet = int(np.isfinite(self.ready).sum())
        self.floor = on_floor(self.groups, finite, fleet, self.now)
        factors = fair_factors(self.virtual, tenants)
        self.due: list[float] = []
        self.weight: list[float] = []
        for g, group in enumerate(self.groups):
            due, age = aged(group, self.now, finite[g])
            slo = _FLOOR_FACTOR if self.floor[g] else _CLASS_FACTOR[group.slo_class]
            self.due.append(due)
            self.weight.append(
                group.requests * each.get(group.slo_class, 0.0) * slo * factors[g] * age
            )

    def _machines(self, estimator: Durations) -> None:
        m, k = len(self.instances), len(self.models)
        self.serves = np.zeros((m, k), dtype=np.bool_)
        self.awake = np.zeros((m, k), dtype=np.bool_)
        self.ready, self.ready_var = np.full(m, np.inf), np.zeros(m)
        # setup[i, a, b] is the time lost at i between work of a and of b; a = START is the last.
        self.setup = np.full((m, k + 1, k), np.inf)
        known: dict[tuple[object, ...], tuple[NDArray[np.bool_], NDArray[np.bool_], Floats]] = {}
        for i, view in enumerate(self.instances):
            if not any(estimator.serves(i, model) for model in self.models):
                continue
            ready = estimator.ready(i)
            self.ready[i], self.ready_var[i] = ready.mean, ready.var
            alike = (view.device, view.slots, view.kv_tokens, view.interactive_share)
            key = (*alike, view.models, ready.awake)
            if key not in known:
                known[key] = self._setups(i, ready.awake, estimator)
            self.serves[i], self.awake[i], self.setup[i] = known[key]

    def _setups(
        self, i: int, awake_models: frozenset[str], estimator: Durations
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_], Floats]:
        """What an instance serves, what is awake there, and the time lost between models."""
        k = len(self.models)
        serves = np.array([estimator.serves(i, model) for model in self.models])
        awake = np.array([model in awake_models for model in self.models])
        setup = np.full((k + 1, k), np.inf)
        roots = {model.name: model.root for model in self.instances[i].models}
        hosted = np.flatnonzero(serves).tolist()
        drains = {a: estimator.drain_s(i, self.models[a]) for a in hosted}
        for b in hosted:
            swap_s = estimator.swap_s(i, self.models[b])
            setup[START, b] = 0.0 if awake[b] else swap_s
            for a in hosted:
                alike = roots.get(self.models[a], a) == roots.get(self.models[b], b)
                together = alike or (awake[a] and awake[b])
                setup[a, b] = 0.0 if together else swap_s + drains[a]
        return serves, awake, setup

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

    @cached_property
    def lines(self) -> Floats:
        """The requests of each group, at least one."""
        return np.array([max(1, group.requests) for group in self.groups], dtype=np.float64)

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
        able = [g for g in range(len(self.groups)) if math.isfinite(self.least[g])]
        able.sort(key=ranks.__getitem__)  # type: ignore[arg-type]
        return np.array(able, dtype=np.int64)

    @cached_property
    def by_deadline(self) -> Ints:
        """Placeable groups, earliest deadline first; of equal ones the tenant's that had less."""
        arrived = np.array([group.arrived_at for group in self.groups])
        order = np.lexsort((arrived, np.array(self.virtual), self.columns.due))
        able: Ints = order[np.isfinite(np.array(self.least))[order]]
        return able

    @cached_property
    def rank(self) -> list[int]:
        """Each placeable group's position in `by_deadline`."""
        order = self.by_deadline
        rank = np.zeros(len(self.groups), dtype=np.int64)
        rank[order] = np.arange(order.size)
        return [int(place) for place in rank]

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

    def times(self, queues: Queues) -> Times:
        """Times along all queues at once."""
        bounds = np.zeros(len(queues) + 1, dtype=np.int64)
        np.cumsum([len(queue) for queue in queues], out=bounds[1:])
        flat = np.fromiter((g for queue in queues for g in queue), np.int64, int(bounds[-1]))
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
