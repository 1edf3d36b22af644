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
    """One model's conformal state per class."""

    classes: Mapping[SloClass, Conformal] = field(default_factory=dict)

    def factor(self, slo_class: SloClass) -> float | None:
        """The class's factor; None while too little was seen."""
        return self.classes.get(slo_class, Conformal()).factor

    def after(self, slo_class: SloClass, predicted_s: float, actual_s: float) -> Calibration:
        """After one more outcome of this class."""
        before = self.classes.get(slo_class, Conformal())
        return Calibration({**self.classes, slo_class: before.after(predicted_s, actual_s)})

    def to_data(self) -> Mapping[str, object]:
        """As plain JSON values."""
        return {
            slo_class.value: {"scores": list(own.scores), "level": own.level}
            for slo_class, own in sorted(self.classes.items())
        }

    @staticmethod
    def from_data(data: object) -> Calibration:
        """What `to_data` wrote; a fresh one from anything else."""
        classes: dict[SloClass, Conformal] = {}
        if isinstance(data, Mapping):
            for slo_class in SloClass:
                own = data.get(slo_class.value)
                if isinstance(own, Mapping) and isinstance(own.get("scores"), list):
                    scores = tuple(float(score) for score in own["scores"])[-WINDOW:]
                    classes[slo_class] = Conformal(scores, float(own.get("level", LEVEL)))
        return Calibration(classes)
