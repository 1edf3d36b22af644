"""What the last look at the queue found, and whether that still stands.

Where work was only handed out and done since (nothing came or was taken away, nothing was learned,
the fleet is what it was, and nobody is idle beside work), the plan's order holds for what is left
of it: a pass need not form groups and check deadlines again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from qlm_batch.domain.snapshot import Assignment, InstanceState, Plan, Residency, Snapshot
from qlm_batch.scheduling.estimator import Estimator
from qlm_batch.scheduling.profile import Knowledge
from qlm_batch.scheduling.replanning import fleet_signature

Run = tuple[int, int]
"""A run's id and a generation."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """A plan, what it rests on, and what was handed out of it since.

    `queued` are the slices each run should still have queued; `taken` the slices of a group's runs
    that were handed out, by the group's key.
    """

    plan: Plan
    estimator: Estimator
    groups: int
    fleet: tuple[tuple[str, ...], ...]
    queued: Mapping[Run, int]
    taken: Mapping[tuple[str, Run], int] = field(default_factory=dict)

    @staticmethod
    def of(plan: Plan, estimator: Estimator, groups: int, snapshot: Snapshot) -> Outlook:
        """The plan just looked at, before anything is handed out of it."""
        return Outlook(plan, estimator, groups, fleet_signature(snapshot), _queued(snapshot))

    def stands(self, snapshot: Snapshot, known: Knowledge) -> bool:
        """Whether neither the snapshot nor what is known now brings news."""
        return (
            not known.is_news(self.estimator.knowledge)
            and _queued(snapshot) == self.queued
            and fleet_signature(snapshot) == self.fleet
            and not _dry_beside_work(snapshot)
        )

    def handed(self, assignments: Iterable[Assignment]) -> Outlook:
        """After so much more was handed out."""
        queued, taken = dict(self.queued), dict(self.taken)
        for made in assignments:
            run = (made.run_id, made.generation)
            queued[run] -= made.slices
            if not queued[run]:
                del queued[run]
            key = (made.group_key, run)
            taken[key] = taken.get(key, 0) + made.slices
        return replace(self, queued=queued, taken=taken)


def _queued(snapshot: Snapshot) -> dict[Run, int]:
    return {(run.run_id, run.generation): run.slices for run in snapshot.runs if run.slices}


def _dry_beside_work(snapshot: Snapshot) -> bool:
    """Whether an instance holds nothing while work it could serve is queued."""
    dry = [
        view
        for view in snapshot.instances
        if view.state is InstanceState.READY and not view.assigned
    ]
    if not dry:
        return False
    wanted = {run.model for run in snapshot.runs if run.slices}
    return any(
        model.name in wanted and model.residency is not Residency.FAILED
        for view in dry
        for model in view.models
    )
