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

from qlm_batch.domain.jobs import EngineKind
from qlm_batch.domain.snapshot import (
    AssignedView,
    InstanceState,
    RequestGroup,
    Residency,
    Snapshot,
)
from qlm_batch.scheduling.basis import Basis
from qlm_batch.scheduling.fairness import Served
from qlm_batch.scheduling.flows import (
    Flow,
    Shape,
    few,
    from_grid,
    saturated,
    shape_of_assigned,
    shape_of_group,
    to_grid,
)
from qlm_batch.scheduling.grouping import ModelCapacity
from qlm_batch.scheduling.profile import Knowledge
from qlm_batch.scheduling.speed import Amount, Speed, StepTime
from qlm_batch.scheduling.steady import Source, Steady, steady
from qlm_batch.scheduling.tabulating import tabulated
from qlm_batch.scheduling.worktable import WorkTable

VERSION = "flow-3"
"""Names this estimator in promises."""

UNKNOWN_LENGTHS = 0.5
"""The relative error of the prior's mean length: others' workloads differ by so much."""
UNKNOWN_SPEED = 0.5
"""The relative error of a speed that is only published, or guessed from another device's."""


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


class Doubt(NamedTuple):
    """What is told of a model's work at some instances beside its mean and variance.

    Scores of half and of 95 % of outcomes, see `Quantiles`; the sum of squared relative errors of
    the model, of a mean length known from few requests, and of what was not learned yet; whether
    the last is no more than that of the model.
    """

    middle: float
    high: float
    squared: float
    informed: bool


class Estimator:
    """Estimates for one snapshot. Equal snapshots and settings give equal answers."""

    def __init__(
        self,
        snapshot: Snapshot,
        config: EstimatorConfig | None = None,
        knowledge: Knowledge | None = None,
        before: Estimator | None = None,
    ) -> None:
        """`knowledge` is what the snapshot's profiles say, where the caller has it read already.

        What the estimator `before` this one worked out is taken over where it still holds.
        """
        self.config = config or EstimatorConfig()
        self.now = snapshot.now
        self.instances = snapshot.instances
        self.knowledge = knowledge or Knowledge.of(snapshot.profiles)
        known = None if before is None else before.basis
        basis = Basis.of(snapshot.instances, self.knowledge, known)
        self.basis: Basis = basis
        self.fleet = basis.fleet
        self._running, self._expected = basis.running, basis.expected
        self._flows, self._speeds, self._drains = basis.flows, basis.speeds, basis.drains
        self._doubts: dict[tuple[str, int], Doubt] = {}
        self._ready: dict[tuple[int, bool], Ready] = {}

    @property
    def served(self) -> Served:
        """What tenants were served lately."""
        return self.knowledge.served

    # Speed

    def serves(self, instance: int, model: str) -> bool:
        """Whether this instance (by index) takes work of `model`."""
        return self.fleet.serves(instance, model)

    def flow(
        self, instance: int, model: str, kind: EngineKind, tenant: str, prompt: float, cap: float
    ) -> Flow:
        """Saturated work with mean prompts of `prompt` and outputs of at most `cap` tokens.

        The instance must host the model. Time lost to interactive traffic is not in it.
        """
        return self._flow(instance, (model, kind, tenant, to_grid(prompt), to_grid(cap)))

    def _flow(self, instance: int, shape: Shape) -> Flow:
        key = (shape, self.fleet.class_of[instance])
        found = self._flows.get(key)
        if found is None:
            view = self.instances[instance]
            model, kind, tenant, prompt, cap = shape
            lengths = self._expected.capped(model, kind, tenant, cap)
            speed, step = self._speed(self.fleet.roots.get(model, model), view.device)
            running, step_s = saturated(
                speed,
                step,
                lengths.mean,
                lengths.var,
                from_grid(prompt),
                view.slots,
                view.kv_tokens,
                kind,
            )
            per_token = step_s / running
            found = self._flows[key] = Flow(
                running,
                step_s,
                max(1.0, lengths.mean) * per_token,
                lengths.var * per_token**2,
                lengths,
            )
        return found

    def _speed(self, model: str, device: str) -> tuple[Speed, StepTime]:
        found = self._speeds.get((model, device))
        if found is None:
            speed = self.knowledge.speed(model, device)
            found = self._speeds[model, device] = (speed, speed.step_time())
        return found

    def capacities(self, snapshot: Snapshot) -> Mapping[str, ModelCapacity]:
        """For each model that is served, a typical instance as its queued work would find it."""
        runs = snapshot.runs
        kinds = {run.model: run.kind for run in runs}
        index = {model: n for n, model in enumerate(kinds)}
        own = np.array([index[run.model] for run in runs], dtype=np.int64)
        requests, prompts, limits = (
            np.bincount(own, amounts, len(kinds)).tolist()
            for amounts in (
                [run.requests for run in runs],
                [run.prompt_tokens for run in runs],
                [run.max_tokens for run in runs],
            )
        )
        capacities: dict[str, ModelCapacity] = {}
        for (model, kind), count, prompt, most in zip(
            kinds.items(), requests, prompts, limits, strict=True
        ):
            each = max(1.0, count)
            shape = (model, kind, "", to_grid(prompt / each), to_grid(most / each))
            flows = sorted(
                ((self._flow(int(at[0]), shape), at.size) for at in self.fleet.servers(model)),
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

    def table(self, groups: Sequence[RequestGroup]) -> WorkTable:
        """What these groups would take at each instance, in the snapshot's order."""
        sources = [(group.model, group.kind, group.tenant) for group in groups]
        return tabulated(self.steady(groups, sources), self.fleet)

    def steady(
        self, work: Sequence[RequestGroup | AssignedView], sources: Sequence[Source]
    ) -> Steady:
        """How this work, each of its source, would run at each class of instances."""
        return steady(work, sources, self.fleet, self._expected, self._speed)

    def expected_tokens(self, group: RequestGroup) -> float:
        """The output tokens the group's requests are expected to have in all."""
        shape = shape_of_group(group)
        model, kind, tenant, _, cap = shape
        usual = self._expected.capped(model, kind, tenant, cap).mean
        return usual * group.requests * self._expected.factor(shape, group.prompts)

    # The state of an instance

    def fit_alone(
        self, groups: Sequence[RequestGroup], instances: Sequence[int]
    ) -> NDArray[np.bool_]:
        """Whether each group would be on time as the next thing after what is claimed at each.

        A row for each group; all at once, for in overload there are thousands.
        """
        table, each = self.table(groups), np.arange(len(groups))
        left_s = np.array([group.deadline for group in groups]) - self.now
        models = sorted({group.model for group in groups})
        own = np.array([models.index(group.model) for group in groups], dtype=np.int64)
        fits = np.zeros((len(groups), len(instances)), dtype=np.bool_)
        for n, i in enumerate(instances):
            ready = self.ready(i, claimed_only=True)
            lost = np.array([self._lost_s(i, model, ready.awake) for model in models])
            work = table.mean[table.kind, i] * table.count + table.tail(each, np.full(each.size, i))
            var = ready.var + table.var[table.kind, i] * table.count
            needs_s = self.quantile(ready.mean + lost[own] + work, var, self.config.quantile)
            fits[:, n] = needs_s <= left_s
        return fits

    def _lost_s(self, instance: int, model: str, awake: frozenset[str]) -> float:
        """What is lost until work of the model can begin where these are awake; inf: not served."""
        if not self.serves(instance, model):
            return math.inf
        return 0.0 if model in awake else self.swap_s(instance, model)

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
        view, models = self.instances[instance], self.fleet.views[instance]
        awake = frozenset(m.name for m in view.models if m.residency is Residency.AWAKE)
        mean, var = 0.0, 0.0
        if view.state is InstanceState.STARTING:
            mean += self.config.start_s
        sole, slow = self._running.sole[instance], float(self.fleet.slow[instance])
        order = sorted(
            (own for own in view.assigned if own.requests > 0 and own.model in models),
            key=lambda own: (own.model not in awake, own.model, own.deadline, own.run_id),
        )
        running = self._running.counts[instance]
        # What runs of interactive requests is not among what was assigned.
        begun = max(0, running - view.interactive_running)
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
        shape = shape_of_assigned(own, self.fleet.views[instance][own.model])
        flow = self._flow(instance, shape)
        last = few(min(own.requests, math.ceil(flow.running)))
        return flow.tail_s(last) * float(self.fleet.slow[instance])

    def flow_of(self, instance: int, group: RequestGroup) -> Flow:
        """The group's kind of work at an instance that hosts its model."""
        return self._flow(instance, shape_of_group(group))

    def swap_s(self, instance: int, model: str) -> float:
        """Time to make a hosted model the awake one: what was measured, else what is assumed."""
        view = self.fleet.views[instance][model]
        if view.wake_s is not None and view.wake_s > 0.0:
            return view.wake_s
        cold = view.residency is Residency.COLD
        return self.config.load_s if cold else self.config.wake_s

    def drain_s(self, instance: int, model: str) -> float:
        """Time lost while the running batch of `model` empties before another model can run."""
        key = (model, self.fleet.class_of[instance])
        half_s = self._drains.get(key)
        if half_s is None:
            shape = (model, EngineKind.GENERATE, "", to_grid(256.0), to_grid(1024.0))
            flow = self._flow(instance, shape)
            half_s = self._drains[key] = 0.5 * flow.lengths.mean * flow.step_s
        return half_s * float(self.fleet.slow[instance])

    # Distributions

    def spread(self, mean: Amount, var: Amount) -> Amount:
        """Standard deviation of durations of this mean and variance, with the model's error."""
        found: Amount = np.sqrt(np.maximum(0.0, var) + (self.config.model_error * mean) ** 2)
        return found

    def quantile(self, mean: Amount, var: Amount, level: float) -> Amount:
        """The duration not exceeded with probability `level`; never negative."""
        found: Amount = np.maximum(0.0, mean + _z(level) * self.spread(mean, var))
        return found

    def doubt(self, model: str, instance: int) -> Doubt:
        """What is to be told of the model's work at an instance."""
        key = (model, self.fleet.class_of[instance])
        found = self._doubts.get(key)
        if found is None:
            book = self.knowledge.book(model)
            speed = self.knowledge.speed(
                self.fleet.roots.get(model, model), self.instances[instance].device
            )
            quantiles, of_model = self.knowledge.quantiles(model), self.config.model_error
            ignorance = math.hypot(UNKNOWN_LENGTHS * book.unknown, UNKNOWN_SPEED * speed.unknown)
            found = self._doubts[key] = Doubt(
                quantiles.middle,
                quantiles.high,
                of_model**2 + book.mean_error**2 + ignorance**2,
                ignorance <= of_model,
            )
        return found


@lru_cache
def _z(level: float) -> float:
    """The standard normal quantile."""
    return NormalDist().inv_cdf(level)


def _claimed(own: AssignedView) -> int:
    """Its requests in leased slices, all slices taken for equally full."""
    return math.ceil(own.requests * own.leased_slices / max(1, own.slices))
