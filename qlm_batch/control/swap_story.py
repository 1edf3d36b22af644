"""Swaps that were made, as decisions: which model came awake where, for whom, in what time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qlm_batch.domain.snapshot import Decision, Plan, Snapshot

Hosted = tuple[str, str, str]
"""An instance, its boot and a model."""
Swaps = Mapping[Hosted, tuple[int, float]]
"""How often each was made awake, and the seconds that took in all."""


def swaps_of(snapshot: Snapshot) -> Swaps:
    """What the instances count since their boots."""
    return {
        (view.name, view.boot_id, model.name): (model.swaps, model.swap_s)
        for view in snapshot.instances
        for model in view.models
        if model.swaps
    }


def woken(told: Swaps, plan: Plan, snapshot: Snapshot) -> list[Decision]:
    """The swaps since `told`, one decision for each batch with work for the model there."""
    batches: dict[tuple[str, str], set[str]] = {}
    for view in snapshot.instances:
        for own in view.assigned:
            batches.setdefault((view.name, own.model), set()).add(own.batch_id)
    for queue in plan.queues:
        for entry in queue.groups:
            waiting = batches.setdefault((queue.instance, entry.group.model), set())
            waiting.update(entry.group.batches)
    decisions = []
    for hosted, (swaps, swap_s) in swaps_of(snapshot).items():
        instance, _, model = hosted
        before, before_s = told.get(hosted, (0, 0.0))
        if swaps <= before:
            continue
        took_s = (swap_s - before_s) / (swaps - before)
        detail: dict[str, object] = {
            "model": model,
            "seconds": round(took_s, 3),
            "reason": f"model {model} was made awake in {took_s:.1f} s",
        }
        waited: Sequence[str | None] = sorted(batches.get((instance, model), ())) or (None,)
        for batch_id in waited:
            decisions.append(Decision("woken", plan.made_at, batch_id, None, instance, detail))
    return decisions
