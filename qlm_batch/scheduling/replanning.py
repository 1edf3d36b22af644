"""When the plan stands, and when a new one is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlm_batch.domain.snapshot import InstanceState, Plan, RequestGroup, Residency, Snapshot
from qlm_batch.scheduling.policies.base import standing, to_plan
from qlm_batch.scheduling.problem import Durations, Problem


@dataclass(frozen=True, slots=True)
class ReplanConfig:
    """A plan stands for at most `every_s`; an idle instance replaces it after `least_s`.

    Up to `arrivals` new groups at once are put into it without planning anew.
    """

    every_s: float = 5.0
    least_s: float = 1.0
    arrivals: int = 16

    def is_old(self, incumbent: Incumbent, snapshot: Snapshot) -> bool:
        """Whether the plan has stood long enough."""
        return not 0.0 <= snapshot.now - incumbent.made_at < self.every_s


@dataclass(frozen=True, slots=True)
class Incumbent:
    """The plan in force: made at `made_at`, for a fleet with this signature."""

    plan: Plan
    made_at: float
    fleet: tuple[tuple[str, ...], ...]


def fleet_signature(snapshot: Snapshot) -> tuple[tuple[str, ...], ...]:
    """What makes two fleets the same for planning: names, boots, states and models that work."""
    return tuple(
        (
            view.name,
            view.boot_id,
            view.state.value,
            *sorted(m.name for m in view.models if m.residency is not Residency.FAILED),
        )
        for view in snapshot.instances
    )


def carried_on(
    snapshot: Snapshot,
    groups: Sequence[RequestGroup],
    estimator: Durations,
    incumbent: Incumbent,
    config: ReplanConfig,
) -> tuple[Plan | None, str]:
    """The incumbent's order with today's groups and times, and why it changed; or None and why not.

    The reason is empty where the order stands. Few arrivals are put where they make nothing late;
    their plan is whole again when the incumbent's time is over.
    """
    age_s = snapshot.now - incumbent.made_at
    if fleet_signature(snapshot) != incumbent.fleet:
        return None, "the fleet changed"
    if config.is_old(incumbent, snapshot):
        return None, "the plan is old"
    problem = Problem(snapshot, groups, estimator)
    kept = standing(problem, incumbent.plan)
    if kept is None:
        return None, "the fleet changed"
    came = len(kept.new)
    if came > config.arrivals:
        return None, "work came"
    times = problem.times(kept.queues)
    late = times.flat[times.done > problem.columns.due[times.flat]]
    if not kept.partly.issuperset(late.tolist()):
        return None, "a deadline is in danger"
    if age_s >= config.least_s and _idle_beside_work(problem, kept.queues):
        return None, "an instance became free"
    if came and not kept.insert(problem):
        return None, "work came"
    plan = to_plan(problem, kept.queues, kept.shed, incumbent.plan.policy)
    return plan, "work came" if came else ""


def _idle_beside_work(problem: Problem, queues: list[list[int]]) -> bool:
    """Whether an instance has nothing while a group it serves waits behind another."""
    waiting = {problem.model[g] for queue in queues for g in queue[1:]}
    return any(
        not queue
        and view.state is InstanceState.READY
        and not view.assigned
        and any(problem.serves[i, k] for k in waiting)
        for i, (view, queue) in enumerate(zip(problem.instances, queues, strict=True))
    )
