"""Correction of how much an instance is handed, from how fast it works that off.

A profile that thinks an engine slower than it is would otherwise leave it idle between passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from qlm_batch.domain.snapshot import Assignment, InstanceView, Snapshot

MOST = 64.0
"""The factor is at most this."""
THIN_S = 0.25
"""An instance that will have worked off what it holds within this is handed more."""
AHEAD_S = 1.0
"""So much more that it lasts this long at the speed seen."""
PLENTY_S = 2.0
"""An instance that holds work for longer is handed less again."""
PATIENCE_S = 2.0
"""A factor shrinks no sooner than this after it changed: what was just given is still there."""
_LEAST_GROWTH, _MOST_GROWTH = 2.0, 16.0


@dataclass(frozen=True, slots=True)
class Pace:
    """`factors` multiply what instances are handed: 1 for those not named.

    `fresh` are the instances that held nothing before they were handed work and for which more is
    queued: how fast they are is about to be seen.
    """

    factors: Mapping[str, float] = field(default_factory=dict)
    fresh: frozenset[str] = frozenset()
    _handed: Mapping[str, int] = field(default_factory=dict)
    _handed_at: float = 0.0
    _short: frozenset[str] = frozenset()
    _changed_at: Mapping[str, float] = field(default_factory=dict)

    @property
    def hasty(self) -> bool:
        """Whether the next pass should not wait its usual time."""
        return bool(self.factors or self.fresh)

    def seen(self, snapshot: Snapshot) -> Pace:
        """What the instances hold now, before they are handed more."""
        factors, changed_at = {}, {}
        elapsed = snapshot.now - self._handed_at
        for view in snapshot.instances:
            before = factor = self.factors.get(view.name, 1.0)
            since = self._changed_at.get(view.name, snapshot.now)
            handed = self._handed.get(view.name, 0)
            left = _slices_of(view)
            short = view.name in self._short
            rate = max(0, handed - left) / elapsed if elapsed > 0.0 else 0.0
            if short and left <= THIN_S * rate:
                growth = min(_MOST_GROWTH, max(_LEAST_GROWTH, AHEAD_S * rate / handed))
                factor = min(MOST, growth * factor)
            elif (left > PLENTY_S * rate or not short) and snapshot.now - since >= PATIENCE_S:
                factor = max(1.0, factor / 2.0)
            if factor > 1.0:
                factors[view.name] = factor
                changed_at[view.name] = since if factor == before else snapshot.now
        return Pace(factors, frozenset(), self._handed, self._handed_at, self._short, changed_at)

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
        holding = {view.name: _slices_of(view) for view in snapshot.instances}
        return Pace(
            self.factors,
            frozenset(name for name in short if not holding[name]),
            {name: slices + given.get(name, 0) for name, slices in holding.items()},
            snapshot.now,
            short,
            self._changed_at,
        )


def _slices_of(view: InstanceView) -> int:
    return sum(own.slices for own in view.assigned)
