"""What changed between two plans, as decisions: the rows that explain a batch later."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

from qlm_batch.control.swap_story import Swaps, swaps_of, woken
from qlm_batch.domain.snapshot import (
    Decision,
    InstanceView,
    Plan,
    PlannedGroup,
    Residency,
    Snapshot,
)

MOST_DECISIONS = 200
"""Most rows of one plan beside promises, which are made once; places left out are told later."""


EVICTIONS_EVERY_S = 30.0
"""Evictions at an instance are told together this often: under interactive load they are many."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a batch's next work stands and why, and the first of its groups that was let go."""

    instance: str | None
    next: PlannedGroup
    shed: PlannedGroup | None


@dataclass(frozen=True, slots=True)
class Story:
    """What was last told about each batch: its instance (None: nowhere) and whether it was shed.

    `swaps` are the (batch, instance, model) that wait for a swap; `evicted` counts by instance and
    boot how often batch requests had given way to interactive ones, and when that was told; `woken`
    are the swaps that were told as made.
    """

    places: Mapping[str, tuple[str | None, bool]] = field(default_factory=dict)
    promised: frozenset[str] = frozenset()
    swaps: frozenset[tuple[str, str, str]] = frozenset()
    evicted: Mapping[tuple[str, str], tuple[int, float]] = field(default_factory=dict)
    woken: Swaps = field(default_factory=dict)

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
        known = {boot: (count, snapshot.now) for boot, count in _evictions(snapshot).items()}
        return Story(told, evicted=known, woken=swaps_of(snapshot))

    def told(
        self, plan: Plan, snapshot: Snapshot, recalled: Collection[str] = ()
    ) -> tuple[tuple[Decision, ...], Story]:
        """The decisions of this plan that were not told yet, and the story after them.

        `planned`: a batch got its first place. `moved`: its next work goes to another instance.
        `shed`: some of it was let go. `restored`: none is any more. `promised`: its first estimate.
        `recalled`: work not begun is taken back from an instance named in `recalled`. `swapped`: it
        waits for its model to be brought in. `woken`: its model was. `evicted`: its running
        requests gave way.
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
                about = place.shed if kind == "shed" and place.shed else place.next
                detail: dict[str, object] = {"reason": about.reason, "policy": plan.policy}
                before = self.places.get(batch_id)
                if kind == "moved" and before is not None:
                    detail["from"] = before[0]
                decisions.append(
                    Decision(kind, now, batch_id, about.group.key, place.instance, detail)
                )
            after[batch_id] = (place.instance, place.shed is not None)
        room = MOST_DECISIONS - len(decisions)
        promised = set(self.promised & snapshot.unpromised)
        for batch_id in sorted(snapshot.unpromised - self.promised):
            estimate = plan.estimates.get(batch_id)
            if estimate is not None and estimate.p50 is not None:
                promised.add(batch_id)
                detail = {
                    "p50": estimate.p50,
                    "p95": estimate.p95,
                    "miss_probability": estimate.miss_probability,
                    "reason": estimate.reason,
                    "estimator": plan.estimator,
                }
                decisions.append(Decision("promised", now, batch_id, detail=detail))
        swaps = _swaps(plan, snapshot)
        happened = [
            *_recalls(snapshot, recalled, now),
            *(made for key, made in swaps.items() if key not in self.swaps),
            *woken(self.woken, plan, snapshot),
            *_made_way(snapshot, self.evicted, now),
        ]
        decisions += happened[:room]
        evicted = {
            boot: told if now - told[1] < EVICTIONS_EVERY_S else (count, now)
            for boot, count in _evictions(snapshot).items()
            for told in [self.evicted.get(boot, (0, 0.0))]
        }
        found = frozenset(promised), frozenset(swaps), evicted, swaps_of(snapshot)
        return tuple(decisions), Story(after, *found)


def _recalls(snapshot: Snapshot, recalled: Collection[str], now: float) -> Iterator[Decision]:
    """One for every batch that had work waiting at an instance it is taken back from."""
    for view in snapshot.instances:
        if view.name in recalled:
            for batch_id in dict.fromkeys(
                own.batch_id for own in view.assigned if own.slices > own.leased_slices
            ):
                reason = "taken back before it began, to make way for more urgent work"
                yield Decision("recalled", now, batch_id, None, view.name, {"reason": reason})


def _swaps(plan: Plan, snapshot: Snapshot) -> dict[tuple[str, str, str], Decision]:
    """The batches whose work heads a queue while another model is awake there."""
    views = {view.name: view for view in snapshot.instances}
    found: dict[tuple[str, str, str], Decision] = {}
    for queue in plan.queues:
        view = views.get(queue.instance)
        if view is None or not queue.groups or queue.groups[0].shed:
            continue
        group = queue.groups[0].group
        awake = [model.name for model in view.models if model.residency is Residency.AWAKE]
        if not awake or group.model in awake:
            continue
        reason = f"waits until {view.name} has swapped {', '.join(awake)} for {group.model}"
        for batch_id in group.batches:
            found[batch_id, view.name, group.model] = Decision(
                "swapped",
                plan.made_at,
                batch_id,
                group.key,
                view.name,
                {"reason": reason, "awake": awake, "wanted": group.model},
            )
    return found


def _evictions(snapshot: Snapshot) -> dict[tuple[str, str], int]:
    return {(view.name, view.boot_id): view.evictions for view in snapshot.instances}


def _made_way(
    snapshot: Snapshot, before: Mapping[tuple[str, str], tuple[int, float]], now: float
) -> Iterator[Decision]:
    """One for every batch at an instance where running requests gave way since it was last told."""
    for view in snapshot.instances:
        count, told_at = before.get((view.name, view.boot_id), (0, 0.0))
        times = view.evictions - count
        if times <= 0 or now - told_at < EVICTIONS_EVERY_S:
            continue
        often = "once" if times == 1 else f"{times} times"
        reason = (
            f"on {view.name} running batch requests gave way {often} to interactive ones;"
            " they keep their tokens and go on"
        )
        for batch_id in _leased(view):
            detail = {"reason": reason, "times": times}
            yield Decision("evicted", now, batch_id, None, view.name, detail)


def _leased(view: InstanceView) -> list[str]:
    return list(dict.fromkeys(own.batch_id for own in view.assigned if own.leased_slices))


def _kinds(before: tuple[str | None, bool] | None, place: _Place) -> tuple[str, ...]:
    kinds = []
    if before is None:
        kinds.append("planned")
    elif before[0] != place.instance:
        kinds.append("moved")
    if (place.shed is not None) != (before is not None and before[1]):
        kinds.append("shed" if place.shed else "restored")
    return tuple(kinds)


def _places(plan: Plan) -> dict[str, _Place]:
    """Each batch's soonest place; let go if any part is."""
    placed = [
        (entry.start, queue.instance, entry) for queue in plan.queues for entry in queue.groups
    ]
    placed.sort(key=lambda item: (item[0], item[1], item[2].group.key))
    places: dict[str, _Place] = {}
    for _, instance, entry in placed:
        for batch_id in entry.group.batches:
            known = places.get(batch_id)
            if known is None:
                places[batch_id] = _Place(instance, entry, entry if entry.shed else None)
            elif entry.shed and known.shed is None:
                places[batch_id] = replace(known, shed=entry)
    for entry in plan.unplaced:
        for batch_id in entry.group.batches:
            places.setdefault(batch_id, _Place(None, entry, None))
    return places
