"""Just-in-time dispatch: how much of its virtual queue an instance is handed, and what is recalled.

An instance gets enough to keep its batch full until the next pass, and no more, so that a change
of order bites within seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from qlm_batch.domain.snapshot import (
    Assignment,
    InstanceState,
    InstanceView,
    Plan,
    PlannedGroup,
    Residency,
    Snapshot,
)
from qlm_batch.scheduling.estimator import Estimator
from qlm_batch.scheduling.swapping import THIN


@dataclass(frozen=True, slots=True)
class DispatchConfig:
    """`fill` running batches are handed out, or one and what ends within `ahead_s` if more.

    Unclaimed work is recalled for a group with less than `urgency` of its time to the deadline, for
    one group not more often than every `recall_pause_s`.
    """

    fill: float = 1.75
    ahead_s: float = 3.0
    urgency: float = 0.5
    recall_pause_s: float = 5.0


def top_up(
    snapshot: Snapshot,
    plan: Plan,
    estimator: Estimator,
    config: DispatchConfig | None = None,
    factors: Mapping[str, float] | None = None,
    taken: Mapping[tuple[str, tuple[int, int]], int] | None = None,
) -> list[Assignment]:
    """What to assign now, in order: each ready instance filled from the head of its queue.

    A group of a model that is not awake waits until its instance has nothing left of others, unless
    it stands first and presses; its arrival is what makes the instance swap. Nothing behind it is
    assigned before it. Plans may name groups whose slices are gone; the store assigns what there
    is. `factors` multiply the fill of the instances they name (see `pacing`); `taken` are slices
    of the plan that were handed out before, by key of group and run.
    """
    settings = config or DispatchConfig()
    paces, gone = factors or {}, taken or {}
    index = {view.name: i for i, view in enumerate(snapshot.instances)}
    queued: dict[tuple[int, int], int] = {
        (run.run_id, run.generation): run.slices for run in snapshot.runs
    }
    assignments: list[Assignment] = []
    for queue in plan.queues:
        i = index.get(queue.instance, -1)
        if i >= 0 and snapshot.instances[i].state is InstanceState.READY:
            view = snapshot.instances[i]
            pace = paces.get(view.name, 1.0)
            assignments += _fill(
                view, i, queue.groups, queued, gone, estimator, settings, pace, snapshot.now
            )
    return assignments


def _fill(
    view: InstanceView,
    index: int,
    groups: tuple[PlannedGroup, ...],
    queued: dict[tuple[int, int], int],
    taken: Mapping[tuple[str, tuple[int, int]], int],
    estimator: Estimator,
    config: DispatchConfig,
    pace: float,
    now: float,
) -> list[Assignment]:
    # Adapters share their model's engine: what it holds is told by the root.
    roots = {model.name: model.root for model in view.models}
    awake = {model.root for model in view.models if model.residency is Residency.AWAKE}
    held: dict[str, int] = {}
    for own in view.assigned:
        theirs = roots.get(own.model, own.model)
        held[theirs] = held.get(theirs, 0) + own.requests
    assignments: list[Assignment] = []
    full: set[str] = set()
    for placed in groups:
        group = placed.group
        root = roots.get(group.model)
        # Shorter requests would have more room; but what is first goes first.
        if root is None or root in full:
            continue
        others = {model for model, count in held.items() if count and model != root}
        flow = estimator.flow_of(index, group)
        # Awake side by side, models have engines of their own; else only one may hold work.
        if others - awake:
            break
        if others and root not in awake:
            thin = sum(held[model] for model in others) <= THIN * flow.running
            # What was handed out in this very pass is not in the view, and has not begun.
            tails = (estimator.tail_s(index, own) for own in view.assigned)
            last_s = max(tails, default=0.0) if thin else 0.0
            if not _interrupts(placed, view, now, last_s):
                break
        target = pace * max(
            config.fill * flow.running, flow.running + config.ahead_s / flow.request_s
        )
        per_slice = max(1.0, group.requests / max(1, group.slices))
        for part in group.parts:
            room = target - held.get(root, 0)
            run = (part.run_id, part.generation)
            there = min(part.slices - taken.get((group.key, run), 0), queued.get(run, 0))
            slices = min(there, math.ceil(max(0.0, room) / per_slice))
            if slices < there:
                full.add(root)
            if slices > 0:
                queued[run] -= slices
                held[root] = held.get(root, 0) + math.ceil(slices * per_slice)
                assignments.append(Assignment(view.name, *run, slices, group.key))
    return assignments


def recalls(snapshot: Snapshot, plan: Plan, config: DispatchConfig | None = None) -> dict[str, str]:
    """Instances whose assigned but unclaimed slices should be taken back, and for which group.

    Those whose queue now starts with something much more urgent that would have to wait behind it,
    and those that are draining, for no group: an empty key.
    """
    settings = config or DispatchConfig()
    heads: Mapping[str, PlannedGroup] = {
        queue.instance: queue.groups[0] for queue in plan.queues if queue.groups
    }
    found: dict[str, str] = {}
    for view in snapshot.instances:
        unclaimed = [own for own in view.assigned if own.slices > own.leased_slices]
        if not unclaimed:
            continue
        if view.state is InstanceState.DRAINING:
            found[view.name] = ""
            continue
        head = heads.get(view.name)
        if head is None or head.shed or view.state is InstanceState.LOST:
            continue
        head_s = head.group.deadline - snapshot.now
        waiting_s = min(own.deadline for own in unclaimed) - snapshot.now
        if 0.0 < head_s < settings.urgency * waiting_s and _presses(head, snapshot.now):
            found[view.name] = head.group.key
    return found


def rescues(
    snapshot: Snapshot, plan: Plan, estimator: Estimator, config: DispatchConfig | None = None
) -> dict[str, str]:
    """Instances to recall unclaimed work from, each with the group that this would save.

    A group is worth a recall when it is let go or late only because of work that nobody claimed
    yet, and that work is not urgent beside it.
    """
    settings = config or DispatchConfig()
    options = {
        i: min(own.deadline for own in unclaimed) - snapshot.now
        for i, view in enumerate(snapshot.instances)
        if view.state is InstanceState.READY
        and (unclaimed := [own for own in view.assigned if own.slices > own.leased_slices])
    }
    found: dict[str, str] = {}
    if not options:
        return found
    most_s = settings.urgency * max(options.values())
    missed = [
        placed.group
        for queue in plan.queues
        for placed in queue.groups
        if is_missed(placed) and 0.0 < placed.group.deadline - snapshot.now < most_s
    ]
    for group, fits in zip(missed, estimator.fit_alone(missed, list(options)), strict=True):
        left_s = group.deadline - snapshot.now
        for (i, waiting_s), fit in zip(options.items(), fits.tolist(), strict=True):
            name = snapshot.instances[i].name
            if fit and name not in found and left_s < settings.urgency * waiting_s:
                found[name] = group.key
                break
    return found


def _interrupts(placed: PlannedGroup, view: InstanceView, now: float, last_s: float) -> bool:
    """Whether a group of a sleeping model cannot wait for what the instance holds to end.

    It comes before what is due later, and before what is due at the same time where that is thin:
    `last_s` is how long the last of that takes beyond what the plan counts, 0 where there is more.
    """
    due = min((own.deadline for own in view.assigned if own.requests), default=math.inf)
    wait_s = placed.start - now
    if placed.group.deadline == due and last_s > 0.0:
        wait_s += last_s
    elif placed.group.deadline >= due:
        return False
    return not placed.shed and placed.group.deadline - placed.finish_mean < wait_s


def is_missed(placed: PlannedGroup) -> bool:
    """Whether a group is not expected to be on time where it stands."""
    return placed.shed or placed.finish_mean > placed.group.deadline


def _presses(head: PlannedGroup, now: float) -> bool:
    """Whether the time to spare is less than the wait it would be spared."""
    return head.group.deadline - head.finish_mean < 2.0 * (head.start - now)
