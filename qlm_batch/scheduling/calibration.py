"""Adaptive conformal calibration of waiting times (Gibbs and Candès 2021).

Scores are actual over predicted waiting time. The level asked of their empirical quantile moves
after every outcome, up after a miss and down after a hit, so coverage holds under drift.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from qlm_batch.domain.jobs import SloClass

LEVEL = 0.95
STEP = 0.02
WINDOW = 100
LEAST = 20
"""Outcomes below which the uncalibrated quantile is used."""
WIDEST = 20.0
"""No bound exceeds this multiple of the prediction, so none is infinite."""


@dataclass(frozen=True, slots=True)
class Conformal:
    """Scores, newest last, and the level now asked of them."""

    scores: tuple[float, ...] = ()
    level: float = LEVEL

    @property
    def factor(self) -> float | None:
        """What to multiply a predicted wait by to cover LEVEL of outcomes; None while unknown."""
        if len(self.scores) < LEAST:
            return None
        ranked = sorted(self.scores)
        rank = math.ceil(self.level * (len(ranked) + 1))
        if rank > len(ranked):
            return min(WIDEST, 1.5 * ranked[-1])
        return min(WIDEST, ranked[max(0, rank - 1)])

    def after(self, predicted_s: float, actual_s: float) -> Conformal:
        """After a wait predicted as `predicted_s` (its mean, positive) took `actual_s`."""
        score = round(max(0.0, actual_s) / max(predicted_s, 1e-3), 6)
        factor = self.factor
        level = self.level
        if factor is not None:
            missed = score > factor
            level += STEP * (LEVEL if missed else LEVEL - 1.0)
        # Beyond 1 the widest bound is asked for; a long memory of that would outlast its cause.
        level = min(1.02, max(0.5, level))
        return Conformal((*self.scores, score)[-WINDOW:], level)


@dataclass(frozen=True, slots=True)
class Calibration:
    """One model's conformal state per class: of groups' waits, and of batches from promise to end.

    What is promised is an end, so ends count where enough of them were seen.
    """

    waits: Mapping[SloClass, Conformal] = field(default_factory=dict)
    ends: Mapping[SloClass, Conformal] = field(default_factory=dict)

    def factor(self, slo_class: SloClass) -> float | None:
        """The class's factor; None while too little was seen."""
        of_ends = self.ends.get(slo_class, _FRESH).factor
        return self.waits.get(slo_class, _FRESH).factor if of_ends is None else of_ends

    def after(
        self, slo_class: SloClass, predicted_s: float, actual_s: float, *, end: bool = False
    ) -> Calibration:
        """After one more outcome of this class: a wait, or an `end`."""
        own = dict(self.ends if end else self.waits)
        own[slo_class] = own.get(slo_class, _FRESH).after(predicted_s, actual_s)
        return Calibration(self.waits, own) if end else Calibration(own, self.ends)

    def to_data(self) -> Mapping[str, object]:
        """As plain JSON values."""
        return {
            kind: {
                slo_class.value: {"scores": list(own.scores), "level": own.level}
                for slo_class, own in sorted(states.items())
            }
            for kind, states in (("waits", self.waits), ("ends", self.ends))
        }

    @staticmethod
    def from_data(data: object) -> Calibration:
        """What `to_data` wrote; a fresh one from anything else."""
        given = data if isinstance(data, Mapping) else {}
        return Calibration(_states(given.get("waits")), _states(given.get("ends")))


_FRESH = Conformal()


def _states(data: object) -> dict[SloClass, Conformal]:
    states: dict[SloClass, Conformal] = {}
    if isinstance(data, Mapping):
        for slo_class in SloClass:
            own = data.get(slo_class.value)
            if isinstance(own, Mapping) and isinstance(own.get("scores"), list):
                scores = tuple(float(score) for score in own["scores"])[-WINDOW:]
                states[slo_class] = Conformal(scores, float(own.get("level", LEVEL)))
    return states
