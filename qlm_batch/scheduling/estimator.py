"""How long work takes where, and when it will be done: the request-waiting-time estimator.

An instance is a server of a certain throughput for each kind of work. A group occupies it for
requests / throughput, and its last request leaves a little later, when the longest of its last
running batch ends. All durations are seconds from the snapshot's `now`, as mean and variance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qlm_batch.domain.buckets import PromptMix
from qlm_batch.domain.jobs import EngineKind
from qlm_batch.domain.snapshot import (
    AssignedView,
    InstanceState,
    InstanceView,
    RequestGroup,
    Residency,
    Snapshot,
)
from qlm_batch.scheduling.calibration import Foreseen, Quantiles
from qlm_batch.scheduling.expectations import ExpectedLengths
from qlm_batch.scheduling.fairness import Served
from qlm_batch.scheduling.flows import (
    EPSILON_S,
    Flow,
    Shape,
    few,
    from_grid,
    saturated,
    shape_of_assigned,
    shape_of_group,
    to_grid,
    to_grids,
)
from qlm_batch.scheduling.grouping import ModelCapacity
from qlm_batch.scheduling.profile import Knowledge
from qlm_batch.scheduling.running import Running
from qlm_batch.scheduling.speed import Speed, StepTime
from qlm_batch.scheduling.worktable import EXCESS, Floats, GroupWork, Ints, WorkTable

VERSION = "flow-3"
"""Names this estimator in promises."""

UNKNOWN_LENGTHS = 0.5
"""The relative error of the prior's mean length: others' workloads differ by so much."""
UNKNOWN_SPEED = 0.5
"""The relative error of a speed that is only published, or guessed from another device's."""

SERVING = frozenset({InstanceState.READY, InstanceState.STARTING, InstanceState.SWAPPING})
"""States in which an instance has, or will shortly have, time to give."""


@dataclass(frozen=True, slots=True)
class EstimatorConfig:
    """`quantile` is the chance with which a placed group must make its deadline.

    `model_error` is the relative standard error of the model itself: unlike the spread of single
    requests it does not average out along a queue. `start_s`, `wake_s` and `load_s` stand in for
    times not measured yet: of an instance coming up, a model asleep and a cold one.
    """

    quantile: float = 0.8
    model_error: float = 0.1
    start_s: float = 15.0
    wake_s: float = 5.0
    load_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Ready:
    """When an instance has absorbed what it was given already, and which models are awake then.

    `ends` says for each (run, generation) it holds when that is absorbed, mean and variance:
    engines take what they hold by deadline.
    """

    mean: float
    var: float
    awake: frozenset[str]
    ends: Mapping[tuple[int, int], tuple[float, float]] = field(default_factory=dict)


class Last(NamedTuple):
    """When the longest of some requests ends after its start, as mean and variance, seconds.

    `together`: all that is inside the instance runs at once; else it is full, and interactive work
    slows it down.
    """

    mean: float
    var: float
    together: bool


class Estimator:
    """Estimates for one snapshot. Equal snapshots and settings give equal answers."""

    def __init__(
        self,
        snapshot: Snapshot,
        config: EstimatorConfig | None = None,
        knowledge: Knowledge | None = None,
    ) -> None:
        """`knowledge` is what the snapshot's profiles say, where the caller has it read already."""
        self.config = config or EstimatorConfig()
        self.now = snapshot.now
        self.instances = snapshot.instances
        self.knowledge = knowledge or Knowledge.of(snapshot.profiles)
        self._running = Running(snapshot.instances)
        self._views = [{model.name: model for model in i.models} for i in snapshot.instances]
        self._expected = ExpectedLengths(self.knowledge, self._running)
        self._flows: dict[tuple[Shape, int], Flow] = {}
        self._speeds: dict[tuple[str, str], tuple[Speed, StepTime]] = {}
        self._drains: dict[tuple[str, int], float] = {}
        self._bounds: dict[str, Quantiles] = {}
        self._lasts: dict[tuple[Shape, int, int, float], Last] = {}
        self._length_errors: dict[str, float] = {}
        self._ignorances: dict[tuple[str, int], float] = {}
        self._ready: dict[tuple[int, bool], Ready] = {}
        # Instances alike in device, slots and memory are told apart only by their slowdown.
        alike: dict[tuple[str, int, int], list[int]] = {}
        for i, view in enumerate(snapshot.instances):
            alike.setdefault((view.device, view.slots, view.kv_tokens), []).append(i)
        self._kinds = [0] * len(snapshot.instances)
        for kind, members in enumerate(alike.values()):
            for i in members:
                self._kinds[i] = kind
        self._alike = [np.array(members, dtype=np.int64) for members in alike.values()]
        self._slowdowns = [_slowdown(view) for view in snapshot.instances]
        self._slow = np.array(self._slowdowns)
        self._hosts: dict[str, NDArray[np.bool_]] = {}
        self._roots = {
            model.name: model.root for view in snapshot.instances for model in view.models
        }
        self._serving: dict[str, list[Ints]] = {}

    @property
    def served(self) -> Served:
        """What tenants were served lately."""
        return self.knowledge.served

    # Speed

    def serves(self, instance: int, model: str) -> bool:
        """Whether this instance (by index) takes work of `model`."""
        view = self._views[instance].get(model)
        ready = self.instances[instance].state in SERVING
        return ready and view is not None and view.residency is not Residency.FAILED

    def flow(
        self, instance: int, model: str, kind: EngineKind, tenant: str, prompt: float, cap: float
    ) -> Flow:
        """Saturated work with mean prompts of `prompt` and outputs of at most `cap` tokens.

        The instance must host the model. Time lost to interactive traffic is not in it.
        """
        return self._flow(instance, (model, kind, tenant, to_grid(prompt), to_grid(cap)))

    def _flow(self, instance: int, shape: Shape) -> Flow:
        key = (shape, self._kinds[instance])
        found = self._flows.get(key)
        if found is None:
            view = self.instances[instance]
            model, kind, tenant, prompt, cap = shape
            lengths = self._expected.capped(model, kind, tenant, cap)
            pair = (self._roots.get(model, model), view.device)
            if pair not in self._speeds:
                speed = self.knowledge.speed(*pair)
                self._speeds[pair] = (speed, speed.step_time())
            found = saturated(
                *self._speeds[pair], lengths, from_grid(prompt), view.slots, view.kv_tokens, kind
            )
            self._flows[key] = found
        return found

    def capacities(self, snapshot: Snapshot) -> Mapping[str, ModelCapacity]:
        """For each model that is served, a typical instance as its queued work would find it."""
        sums: dict[str, tuple[EngineKind, list[int]]] = {}
        for run in snapshot.runs:
            _, total = sums.setdefault(run.model, (run.kind, [0, 0, 0]))
            total[0] += run.requests
            total[1] += run.prompt_tokens
            total[2] += run.max_tokens
        capacities: dict[str, ModelCapacity] = {}
        for model, (kind, (requests, prompt, most)) in sums.items():
            count = max(1, requests)
            shape = (model, kind, "", to_grid(prompt / count), to_grid(most / count))
            flows = sorted(
                ((self._flow(int(own[0]), shape), own.size) for own in self._servers(model)),
                key=lambda entry: entry[0].running,
            )
            serving = sum(size for _, size in flows)
            middle = (serving - 1) // 2
            for flow, size in flows:
                middle -= size
                if middle < 0:
                    capacities[model] = ModelCapacity(flow.running, flow.request_s, serving)
                    break
        return capacities

    # Work

    def work(self, group: RequestGroup) -> GroupWork:
        """What the group would take at each instance, in the snapshot's order."""
        table = self.table((group,))
        count = table.count[0]
        return GroupWork(table.mean[0] * count, table.var[0] * count, table.tails[0])

    def table(self, groups: Sequence[RequestGroup]) -> WorkTable:
        """What these groups would take at each instance, in the snapshot's order."""
        count = np.array([max(1, group.requests) for group in groups], dtype=np.float64)
        kinds: dict[Shape, int] = {}
        tails: dict[tuple[int, int], int] = {}
        kind: list[int] = []
        amount: list[float] = []
        tail_kind: list[int] = []
        flows: list[list[tuple[int, Flow]]] = []
        largest: list[int] = []
        prompts = to_grids(np.array([group.prompt_tokens for group in groups]) / count)
        limits = to_grids(np.array([group.max_tokens for group in groups]) / count)
        for group, prompt, most, own in zip(groups, prompts, limits, count.tolist(), strict=True):
            shape = (group.model, group.kind, group.tenant, prompt, most)
            row = kinds.get(shape)
            if row is None:
                row = kinds[shape] = len(kinds)
                flows.append(self._flows_of(shape))
                running = [flow.running for _, flow in flows[-1]]
                largest.append(math.ceil(max(running, default=1.0)))
            kind.append(row)
            amount.append(
                own * self._expected.factor(shape, group.prompts) if group.prompts else own
            )
            last = (row, few(min(group.requests, largest[row])))
            tail_kind.append(tails.setdefault(last, len(tails)))
        each, excess, ends = self._by_class(flows, list(tails))
        hosts = [self._hosting(shape[0]) for shape in kinds]
        absent = ~np.array(hosts, dtype=np.bool_).reshape(len(kinds), len(self.instances))
        return WorkTable(
            np.array(kind, dtype=np.int64),
            np.array(amount, dtype=np.float64),
            self._everywhere(each[:, :, 0], self._slow, absent),
            self._everywhere(each[:, :, 1], self._slow**2, absent),
            np.array(tail_kind, dtype=np.int64),
            self._everywhere(ends, self._slow, absent[[row for row, _ in tails]]),
            self._everywhere(excess, self._slow[:, None], absent),
        )

    def _by_class(
        self, flows: Sequence[Sequence[tuple[int, Flow]]], tails: Sequence[tuple[int, int]]
    ) -> tuple[Floats, Floats, Floats]:
        """By row and class of instances a request's mean and variance, the excess, and tails."""
        classes = len(self._alike)
        each = np.full((len(flows), classes, 2), np.inf)
        excess = np.full((len(flows), classes, EXCESS), np.inf)
        ends = np.full((len(tails), classes), np.inf)
        for row, own in enumerate(flows):
            for place, flow in own:
                each[row, place] = flow.request_s, flow.request_var
                excess[row, place] = flow.excess_s
        for n, (row, last) in enumerate(tails):
            for place, flow in flows[row]:
                ends[n, place] = flow.tail_s(last)
        return each, excess, ends

    def _everywhere(self, each: Floats, factor: Floats, absent: NDArray[np.bool_]) -> Floats:
        """Values by class of instances spread over the instances, times their factors."""
        found: Floats = each[:, self._kinds] * factor
        found[absent] = np.inf
        return found

    def expected_tokens(self, group: RequestGroup) -> float:
        """The output tokens the group's requests are expected to have in all."""
        shape = shape_of_group(group)
        model, kind, tenant, _, cap = shape
        usual = self._expected.capped(model, kind, tenant, cap).mean
        return usual * group.requests * self._expected.factor(shape, group.prompts)

    def _flows_of(self, shape: Shape) -> list[tuple[int, Flow]]:
        """The kind of work on each class of instances that serves it."""
        return [
            (self._kinds[int(own[0])], self._flow(int(own[0]), shape))
            for own in self._servers(shape[0])
        ]

    def _servers(self, model: str) -> list[Ints]:
        """The instances that serve the model, those of one class together."""
        found = self._serving.get(model)
        if found is None:
            hosts = self._hosting(model)
            found = self._serving[model] = [
                own for members in self._alike if (own := members[hosts[members]]).size
            ]
        return found

    def _hosting(self, model: str) -> NDArray[np.bool_]:
        """Which instances serve the model."""
        found = self._hosts.get(model)
        if found is None:
            serving = [self.serves(i, model) for i in range(len(self.instances))]
            found = self._hosts[model] = np.array(serving, dtype=np.bool_)
        return found

    # The state of an instance

    def fits_alone(self, instance: int, group: RequestGroup) -> bool:
        """Whether the group would be on time as the next thing after what is claimed there."""
        if not self.serves(instance, group.model):
            return False
        ready, work = self.ready(instance, claimed_only=True), self.work(group)
        swap_s = 0.0 if group.model in ready.awake else self.swap_s(instance, group.model)
        mean = ready.mean + swap_s + float(work.mean[instance] + work.tail[instance])
        var = ready.var + float(work.var[instance])
        needs_s = self.quantile(mean, var, self.config.quantile)
        return needs_s <= group.deadline - self.now

    def ready(self, instance: int, *, claimed_only: bool = False) -> Ready:
        """When new work could begin at an instance that serves, after what it holds already.

        With `claimed_only`, after what it has leased, as if the rest were taken back.
        """
        key = (instance, claimed_only)
        found = self._ready.get(key)
        if found is None:
            found = self._ready[key] = self._make_ready(instance, claimed_only)
        return found

    def _make_ready(self, instance: int, claimed_only: bool) -> Ready:
        view, models = self.instances[instance], self._views[instance]
        awake = frozenset(m.name for m in view.models if m.residency is Residency.AWAKE)
        mean, var = 0.0, 0.0
        if view.state is InstanceState.STARTING:
            mean += self.config.start_s
        sole, slow = self._running.sole[instance], float(self._slow[instance])
        order = sorted(
            (own for own in view.assigned if own.requests > 0 and own.model in models),
            key=lambda own: (own.model not in awake, own.model, own.deadline, own.run_id),
        )
        begun = running = self._running.counts[instance]
        ends: dict[tuple[int, int], tuple[float, float]] = {}
        for own in order:
            if claimed_only and not own.leased_slices:
                continue
            if own.model not in awake:
                mean += self.swap_s(instance, own.model)
                root = models[own.model].root
                awake = frozenset(name for name, hosted in models.items() if hosted.root == root)
            shape = shape_of_assigned(own, models[own.model])
            flow = self._flow(instance, shape)
            rest = _claimed(own) if claimed_only else own.requests
            if own.model == sole and begun:
                # Their tokens so far are behind them; which run each belongs to is not reported.
                inside = min(begun, rest)
                begun -= inside
                rest -= inside
                left, spread = self._expected.still(own.model, shape)
                per_token = flow.step_s / flow.running * slow
                mean += float(left[instance]) * inside / running * per_token
                var += float(spread[instance]) * inside / running * per_token**2
            amount = rest * self._expected.factor(shape, own.prompts)
            mean += amount * flow.request_s * slow
            var += amount * flow.request_var * slow**2
            ends[own.run_id, own.generation] = (mean, var)
        return Ready(mean, var, awake, ends)

    def tail_s(self, instance: int, own: AssignedView) -> float:
        """How much later than its occupation the last of an instance's own work ends."""
        shape = shape_of_assigned(own, self._views[instance][own.model])
        flow = self._flow(instance, shape)
        last = few(min(own.requests, math.ceil(flow.running)))
        return flow.tail_s(last) * float(self._slow[instance])

    def last(
        self, instance: int, shape: Shape, requests: int, prompts: PromptMix, inside: float
    ) -> Last:
        """How long the longest of so many takes at an instance that holds `inside` requests."""
        flow = self._flow(instance, shape)
        factor = self._expected.factor(shape, prompts)
        if inside <= flow.running:
            mean, var = flow.last(requests, inside)
            return Last(mean * factor, var * factor**2, True)
        factor *= self._slowdowns[instance]
        key = (shape, self._kinds[instance], requests, factor)
        found = self._lasts.get(key)
        if found is None:
            mean, var = flow.last(requests, inside)
            found = self._lasts[key] = Last(mean * factor, var * factor**2, False)
        return found

    def flow_of(self, instance: int, group: RequestGroup) -> Flow:
        """The group's kind of work at an instance that hosts its model."""
        return self._flow(instance, shape_of_group(group))

    def swap_s(self, instance: int, model: str) -> float:
        """Time to make a hosted model the awake one: what was measured, else what is assumed."""
        view = self._views[instance][model]
        if view.wake_s is not None and view.wake_s > 0.0:
            return view.wake_s
        cold = view.residency is Residency.COLD
        return self.config.load_s if cold else self.config.wake_s

    def drain_s(self, instance: int, model: str) -> float:
        """Time lost while the running batch of `model` empties before another model can run."""
        key = (model, self._kinds[instance])
        half_s = self._drains.get(key)
        if half_s is None:
            shape = (model, EngineKind.GENERATE, "", to_grid(256.0), to_grid(1024.0))
            flow = self._flow(instance, shape)
            half_s = self._drains[key] = 0.5 * flow.lengths.mean * flow.step_s
        return half_s * float(self._slow[instance])

    # Distributions

    def spread(self, mean: float, var: float) -> float:
        """Standard deviation of a duration of this mean and variance, with the model's error."""
        return math.sqrt(max(0.0, var) + (self.config.model_error * mean) ** 2)

    def quantile(self, mean: float, var: float, level: float) -> float:
        """The duration not exceeded with probability `level`; never negative."""
        return max(0.0, mean + _z(level) * self.spread(mean, var))

    def foreseen(self, mean: float, var: float, model: str, instance: int) -> Foreseen:
        """When work of the model at the instance ends that should take so long, as users are told.

        The relative error is that of the spread, of the model, of the mean length, and of what was
        not learned yet.
        """
        known = self._bounds.get(model)
        if known is None:
            known = self._bounds[model] = self.knowledge.quantiles(model)
        mean = max(EPSILON_S, mean)
        ignorance, of_model = self._ignorance(model, instance), self.config.model_error
        of_lengths = self._length_errors.get(model)
        if of_lengths is None:
            of_lengths = self._length_errors[model] = self.knowledge.book(model).error
        squared = max(0.0, var) / mean**2 + of_model**2 + of_lengths**2 + ignorance**2
        return known.foreseen(mean, math.sqrt(math.log1p(squared)), ignorance <= of_model)

    def _ignorance(self, model: str, instance: int) -> float:
        """The relative error of what was not learned yet about the model's lengths and speed."""
        key = (model, self._kinds[instance])
        found = self._ignorances.get(key)
        if found is None:
            pair = (self._roots.get(model, model), self.instances[instance].device)
            lengths = UNKNOWN_LENGTHS * self.knowledge.book(model).unknown
            speed = UNKNOWN_SPEED * self.knowledge.speed(*pair).unknown
            found = self._ignorances[key] = math.hypot(lengths, speed)
        return found


@lru_cache
def _z(level: float) -> float:
    """The standard normal quantile."""
    return NormalDist().inv_cdf(level)


def _claimed(own: AssignedView) -> int:
    """Its requests in leased slices, all slices taken for equally full."""
    return math.ceil(own.requests * own.leased_slices / max(1, own.slices))


def _slowdown(view: InstanceView) -> float:
    """How much longer everything takes while interactive work is served first."""
    return 1.0 / (1.0 - min(0.95, max(0.0, view.interactive_share)))
