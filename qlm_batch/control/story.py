"""What changed between two plans, as decisions: the rows that explain a batch later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qlm_batch.domain.snapshot import Decision, Plan, Snapshot

MOST_DECISIONS = 200
"""Most rows of one plan; what is left out is told with a later one."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a batch's next work stands, and why any of it was let go."""

    instance: str | None
    group_key: str
    reason: str
    shed: bool


@dataclass(frozen=True, slots=True)
class Story:
    """What was last told about each batch: its instance (None: nowhere) and whether it was shed."""

    places: Mapping[str, tuple[str | None, bool]] = field(default_factory=dict)
    promised: frozenset[str] = frozenset()

    @staticmethod
    def resumed(snapshot: Snapshot) -> Story:
        """What an earlier leader must have told about the saved queues."""
        told: dict[str, tuple[str | None, bool]] = {}
        at = {entry.group_key: entry.instance for entry in snapshot.queues}
        batches = {f"{run.run_id}.{run.generation}": run.batch_id for run in snapshot.runs}
        for key, instance in at.items():
            batch_id = batches.get(key.rpartition(".")[0])
            if batch_id is not None:
                told.setdefault(batch_id, (instance, False))
        return Story(told)

    def told(self, plan: Plan, snapshot: Snapshot) -> tuple[tuple[Decision, ...], Story]:
        """The decisions of this plan that were not told yet, and the story after them.

        `planned`: a batch got its first place. `moved`: its next work goes to another instance.
        `shed`: some of it was let go. `restored`: none is any more. `promised`: its first estimate.
        """
        now = plan.made_at
        places = _places(plan)
        open_batches = places.keys() | {
            own.batch_id for view in snapshot.instances for own in view.assigned
        }
        after = {batch: told for batch, told in self.places.items() if batch in open_batches}
        decisions: list[Decision] = []
        for batch_id, place in places.items():
            kinds = _kinds(self.places.get(batch_id), place)
            if len(decisions) + len(kinds) > MOST_DECISIONS:
                break
            for kind in kinds:
                detail: dict[str, object] = {"reason": place.reason, "policy": plan.policy}
                before = self.places.get(batch_id)
                if kind == "moved" and before is not None:
                    detail["from"] = before[0]
                decisions.append(
                    Decision(kind, now, batch_id, place.group_key, place.instance, detail)
                )
            after[batch_id] = (place.instance, place.shed)
        promised = set(self.promised & snapshot.unpromised)
        for batch_id in sorted(snapshot.unpromised - self.promised):
            estimate = plan.estimates.get(batch_id)
            if estimate is not None and estimate.p50 is not None:
                if len(decisions) >= MOST_DECISIONS:
                    break
                promised.add(batch_id)
                detail = {
                    "p50": estimate.p50,
                    "p95": estimate.p95,
                    "miss_probability": estimate.miss_probability,
                    "reason": estimate.reason,
                    "estimator": plan.estimator,
                }
                decisions.append(Decision("promised", now, batch_id, detail=detail))
        return tuple(decisions), Story(after, frozenset(promised))


def _kinds(before: tuple[str | None, bool] | None, place: _Place) -> tuple[str, ...]:
    kinds = []
    if before is None:
        kinds.append("planned")
    elif before[0] != place.instance:
        kinds.append("moved")
    if place.shed != (before is not None and before[1]):
        kinds.append("shed" if place.shed else "restored")
    return tuple(kinds)


def _places(plan: Plan) -> dict[str, _Place]:
    """Each batch's soonest place; let go if any part is, with that part's reason."""
    placed = [
        (entry.start, queue.instance, entry) for queue in plan.queues for entry in queue.groups
    ]
    placed.sort(key=lambda item: (item[0], item[1], item[2].group.key))
    places: dict[str, _Place] = {}
    for _, instance, entry in placed:
        for batch_id in entry.group.batches:
            known = places.get(batch_id)
            if known is None:
                places[batch_id] = _Place(instance, entry.group.key, entry.reason, entry.shed)
            elif entry.shed and not known.shed:
                places[batch_id] = _Place(known.instance, entry.group.key, entry.reason, shed=True)
    for entry in plan.unplaced:
        for batch_id in entry.group.batches:
            places.setdefault(batch_id, _Place(None, entry.group.key, entry.reason, shed=False))
    return places
