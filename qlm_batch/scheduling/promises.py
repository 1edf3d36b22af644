"""When each batch will be done, read off a plan: what users are shown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from qlm_batch.domain.jobs import Estimate
from qlm_batch.domain.snapshot import InstanceState, Plan, RequestGroup, Snapshot
from qlm_batch.scheduling.calibration import Foreseen
from qlm_batch.scheduling.estimator import VERSION, Estimator, Last
from qlm_batch.scheduling.flows import shape_of_assigned, shape_of_group


@dataclass(slots=True)
class End:
    """When a batch is done, going by the parts seen so far: `told` of the last, of this `model`."""

    model: str
    told: Foreseen
    miss: float
    reason: str

    def add(self, other: End) -> None:
        """Take in one more part."""
        if other.told.p50_s > self.told.p50_s:
            self.model, self.told, self.reason = other.model, other.told, other.reason
        self.miss = max(self.miss, other.miss)

    def estimate(self, now: float) -> Estimate:
        """In absolute times."""
        told = self.told
        return Estimate(now + told.p50_s, now + told.p95_s, self.miss, self.reason, now)


def ends_of(plan: Plan, snapshot: Snapshot, estimator: Estimator) -> Mapping[str, End]:
    """When every batch that has queued or assigned work ends, where all of it is served.

    A batch ends with the last of its parts; it misses when its most endangered part does.
    """
    ends: dict[str, End] = {}
    for mean, var, left_s, model, instance, reason, batch_id in (
        *_planned(plan, snapshot, estimator),
        *_assigned(snapshot, estimator),
    ):
        told = estimator.foreseen(mean, var, model, instance)
        end = End(model, told, told.beyond(left_s), reason)
        known = ends.setdefault(batch_id, end)
        if known is not end:
            known.add(end)
    for placed in plan.unplaced:
        for batch_id in placed.group.batches:
            ends.pop(batch_id, None)
    return ends


def with_estimates(plan: Plan, ends: Mapping[str, End]) -> Plan:
    """The plan with an estimate for every batch; without quantiles where a part is not served."""
    now = plan.made_at
    estimates = {batch_id: end.estimate(now) for batch_id, end in ends.items()}
    for placed in plan.unplaced:
        for batch_id in placed.group.batches:
            estimates[batch_id] = Estimate(None, None, None, placed.reason, now)
    return replace(plan, estimates=estimates, estimator=VERSION)


_Part = tuple[float, float, float, str, int, str, str]
"""Mean and variance of the end of some work, time to its deadline, model, where, why, batch."""


def _planned(plan: Plan, snapshot: Snapshot, estimator: Estimator) -> Iterator[_Part]:
    now = plan.made_at
    index = {view.name: i for i, view in enumerate(snapshot.instances)}
    batch_of = {(run.run_id, run.generation): run.batch_id for run in snapshot.runs}
    for queue in plan.queues:
        if not queue.groups:
            continue
        i = index[queue.instance]
        inside, awake = _inside(snapshot, i, estimator), estimator.ready(i).awake
        for placed in queue.groups:
            group, shape = placed.group, shape_of_group(placed.group)
            inside += group.requests if group.model in awake else math.inf
            end_s, start_s = placed.finish_mean - now, placed.start - now
            last = estimator.last(i, shape, group.requests, group.prompts, inside)
            occupied_s = max(0.0, end_s - last.mean - start_s)
            for batch_id, requests, behind in _batches(group, batch_of):
                own = last
                if requests < group.requests:
                    own = estimator.last(i, shape, requests, group.prompts, inside)
                mean = end_s - (last.mean - own.mean) - behind * occupied_s
                yield (
                    *_sooner(mean, placed.finish_var, own),
                    group.deadline - now,
                    group.model,
                    i,
                    f"let go: {placed.reason}" if placed.shed else placed.reason,
                    batch_id,
                )


def _sooner(mean: float, var: float, last: Last) -> tuple[float, float]:
    """When work ends, as mean and variance: as a full instance would end it, in `mean` and `var`.

    Where all an instance has runs together, it ends when its longest request does.
    """
    if last.together and last.mean < mean:
        return last.mean, last.var
    return mean, var + last.var


def _batches(
    group: RequestGroup, batch_of: Mapping[tuple[int, int], str]
) -> Iterator[tuple[str, int, float]]:
    """The group's batches with their requests, and the share of its work that stands behind."""
    if len(group.batches) == 1:
        yield group.batches[0], group.requests, 0.0
        return
    slices, done = group.slices, 0
    for part in group.parts:
        done += part.slices
        requests = max(1, round(group.requests * part.slices / slices))
        batch_id = batch_of.get((part.run_id, part.generation))
        if batch_id is not None:
            yield batch_id, requests, 1.0 - done / slices


def _inside(snapshot: Snapshot, instance: int, estimator: Estimator) -> float:
    """The requests an instance has in hand; inf where what comes next cannot begin at once."""
    view, awake = snapshot.instances[instance], estimator.ready(instance).awake
    held = [own for own in view.assigned if own.requests > 0]
    if view.state is not InstanceState.READY or any(own.model not in awake for own in held):
        return math.inf
    return view.interactive_running + sum(own.requests for own in held)


def _assigned(snapshot: Snapshot, estimator: Estimator) -> Iterator[_Part]:
    for i, view in enumerate(snapshot.instances):
        if not view.assigned:
            continue
        models = {model.name: model for model in view.models}
        inside = _inside(snapshot, i, estimator)
        for own in view.assigned:
            if own.requests > 0 and estimator.serves(i, own.model):
                mean, var = estimator.ready(i).ends[own.run_id, own.generation]
                shape = shape_of_assigned(own, models[own.model])
                last = estimator.last(i, shape, own.requests, own.prompts, inside)
                yield (
                    *_sooner(mean + estimator.tail_s(i, own), var, last),
                    own.deadline - snapshot.now,
                    own.model,
                    i,
                    f"running on {view.name}; model {own.model}",
                    own.batch_id,
                )
