"""Correction of how much an instance is handed, from whether it ran dry with work still queued.

A profile that thinks an engine slower than it is would otherwise leave it idle between passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from qlm_batch.domain.snapshot import Assignment, InstanceView, Snapshot

MOST = 64.0
"""The factor is at most this."""
PATIENCE_S = 2.0
"""A factor shrinks no sooner than this after it changed: what was just given is still there."""


@dataclass(frozen=True, slots=True)
class Pace:
    """`factors` multiply what instances are handed: 1 for those not named.

    Doubles each time an instance is found with nothing while more was queued than it was handed;
    halves when more than half of that is still there PATIENCE_S later, or nothing more is
    queued.
    """

    factors: Mapping[str, float] = field(default_factory=dict)
    _handed: Mapping[str, int] = field(default_factory=dict)
    _short: frozenset[str] = frozenset()
    _changed_at: Mapping[str, float] = field(default_factory=dict)

    def seen(self, snapshot: Snapshot) -> Pace:
        """What the instances hold now, before they are handed more."""
        factors, changed_at = {}, {}
        for view in snapshot.instances:
            before = factor = self.factors.get(view.name, 1.0)
            since = self._changed_at.get(view.name, snapshot.now)
            handed = self._handed.get(view.name, 0)
            left = _slices_of(view)
            short = view.name in self._short
            if not left and short:
                factor = min(MOST, 2.0 * factor)
            elif (2 * left > handed or not short) and snapshot.now - since >= PATIENCE_S:
                factor = max(1.0, factor / 2.0)
            if factor > 1.0:
                factors[view.name] = factor
                changed_at[view.name] = since if factor == before else snapshot.now
        return Pace(factors, self._handed, self._short, changed_at)

    def handed(self, snapshot: Snapshot, assignments: Iterable[Assignment]) -> Pace:
        """What they were handed; those for which queued work was left may run short of it."""
        given: dict[str, int] = {}
        taken: dict[tuple[int, int], int] = {}
        for made in assignments:
            given[made.instance] = given.get(made.instance, 0) + made.slices
            run = (made.run_id, made.generation)
            taken[run] = taken.get(run, 0) + made.slices
        wanted = {
            run.model
            for run in snapshot.runs
            if run.slices > taken.get((run.run_id, run.generation), 0)
        }
        short = frozenset(
            view.name
            for view in snapshot.instances
            if view.name in given and not wanted.isdisjoint(model.name for model in view.models)
        )
        held = {
            view.name: _slices_of(view) + given.get(view.name, 0) for view in snapshot.instances
        }
        return Pace(self.factors, held, short, self._changed_at)


def _slices_of(view: InstanceView) -> int:
    return sum(own.slices for own in view.assigned)
