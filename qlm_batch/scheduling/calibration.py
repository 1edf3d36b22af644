"""Adaptive conformal calibration of when batches end (Gibbs and Candès 2021).

A score is how much later than foreseen a batch ended: the logarithm of actual over predicted time,
in units of the estimator's own relative error. What is told are its median and 95 % quantile among
a model's latest outcomes and a prior that counts as a few more. The levels asked of the empirical
quantiles move after every outcome, up after a miss and down after a hit, so coverage holds under
drift.

Outcomes come late, those of slow batches last. So a batch that is later already than its bound
counts, with the score it has reached, before it ends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Final

import numpy as np

from qlm_batch.scheduling.speed import Amount

LEVEL = 0.95
STEP = 0.02
WINDOW = 100
LEAN_ON_PRIOR = 8.0
"""Outcomes' worth of the prior: standard normal but for `PRIOR_SPREAD`."""
PRIOR_SPREAD = 1.5
BEYOND = 0.5
"""How much above the greatest score seen a bound lies that has to be above all of them."""
WIDEST = 20.0
"""No bound exceeds this multiple of the prediction, so none is infinite."""
LEAST_ERROR = 1e-3
LEAST_WIDTH = 0.9
"""What of its own error is left to the estimator, however well it did. Batches that wait together
share their luck: a hundred outcomes in a row may be no more than a few that are independent."""

_POINTS: Final = 40
_PRIOR: Final = tuple(
    NormalDist(0.0, PRIOR_SPREAD).inv_cdf((n + 0.5) / _POINTS) for n in range(_POINTS)
)
_Z95: Final = NormalDist().inv_cdf(LEVEL)
_SQRT2: Final = math.sqrt(2.0)
_MOST: Final = math.log(WIDEST)
_LEAST_S: Final = 1e-3


def score(predicted_s: float, error: float, actual_s: float) -> float:
    """How much later than foreseen something ended; see the module."""
    return math.log(max(actual_s, _LEAST_S) / max(predicted_s, _LEAST_S)) / max(error, LEAST_ERROR)


# Not frozen: thousands are made for a plan, and freezing makes that take ten times as long.
@dataclass(slots=True, unsafe_hash=True)
class Foreseen:
    """When something ends, in seconds: what the estimator says, `mean_s` with a relative `error`,
    and what is told after calibration.

    `informed` is what rests on what was learned, not on what is assumed of any model.
    """

    mean_s: float
    error: float
    p50_s: float
    p95_s: float
    informed: bool = True

    def beyond(self, seconds: float) -> float:
        """The chance that it takes longer, by the log-normal distribution of the two quantiles."""
        return chance(float(beyond(seconds, self.p50_s, self.p95_s)))


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Scores that half and 95 % of outcomes are expected not to exceed."""

    middle: float
    high: float

    def widened(self) -> Quantiles:
        """The same, not narrower than LEAST_WIDTH."""
        return Quantiles(self.middle, max(self.high, self.middle + LEAST_WIDTH * _Z95))

    def foreseen(self, mean_s: float, error: float, informed: bool = True) -> Foreseen:
        """What to tell of something that should take `mean_s`."""
        mean_s, error, p50_s, p95_s = bounds(mean_s, error, self.middle, self.high)
        return Foreseen(float(mean_s), float(error), float(p50_s), float(p95_s), informed)


def bounds(
    mean_s: Amount, error: Amount, middle: Amount, high: Amount
) -> tuple[Amount, Amount, Amount, Amount]:
    """What to tell of what should take `mean_s`, by scores of half and of 95 % of outcomes.

    The mean and its relative error as they are used, and the two quantiles in seconds.
    """
    mean_s, error = np.maximum(mean_s, _LEAST_S), np.maximum(error, LEAST_ERROR)
    middle = np.clip(middle * error, -_MOST, _MOST)
    high = np.maximum(middle, np.minimum(_MOST, high * error))
    return mean_s, error, mean_s * np.exp(middle), mean_s * np.exp(high)


def beyond(seconds: Amount, p50_s: Amount, p95_s: Amount) -> Amount:
    """How far `seconds` lie beyond the median, as a deviation for `chance`; -inf without any.

    By the log-normal distribution of the two quantiles.
    """
    spread = np.maximum(1e-6, np.log(p95_s / p50_s) / _Z95)
    with np.errstate(divide="ignore"):
        found: Amount = np.log(np.maximum(0.0, seconds) / p50_s) / (spread * _SQRT2)
    return found


def chance(deviation: float) -> float:
    """The chance that something takes longer than a time that deviates so much."""
    return 0.5 * math.erfc(deviation)


@dataclass(frozen=True, slots=True)
class Conformal:
    """Scores, newest last, the levels now asked of them, and scores of what is `overdue`."""

    scores: tuple[float, ...] = ()
    middle: float = 0.5
    level: float = LEVEL
    overdue: tuple[float, ...] = ()

    def quantiles(self) -> Quantiles:
        """What is expected of the next outcome."""
        values = np.array((*_PRIOR, *self.scores, *self.overdue))
        weights = np.full(values.size, LEAN_ON_PRIOR / _POINTS)
        weights[_POINTS:] = 1.0
        # The next outcome has a place of its own among those seen; the prior knows all places.
        beside = 1.0 - LEAN_ON_PRIOR / (LEAN_ON_PRIOR + values.size - _POINTS)
        order = np.argsort(values, kind="stable")
        values, reached = values[order], np.cumsum(weights[order])

        def at(level: float, own: float) -> float:
            wanted = level * (float(reached[-1]) + own)
            place = int(np.searchsorted(reached, wanted - 1e-9))
            return float(values[place] if place < values.size else values[-1] + BEYOND)

        return Quantiles(at(self.middle, 0.0), at(self.level, beside))

    def after(self, outcome: float) -> Conformal:
        """After one more outcome, whose score this is."""
        told = self.quantiles()
        middle = self.middle + STEP * (0.5 if outcome > told.middle else -0.5)
        level = self.level + STEP * (LEVEL if outcome > told.high else LEVEL - 1.0)
        return replace(
            self,
            scores=(*self.scores, round(outcome, 4))[-WINDOW:],
            middle=min(0.8, max(0.2, middle)),
            # Beyond 1 the widest bound is asked for; a long memory of that would outlast its cause.
            level=min(1.02, max(0.5, level)),
        )

    def to_data(self) -> Mapping[str, object]:
        """As plain JSON values."""
        return {
            "scores": list(self.scores),
            "middle": self.middle,
            "level": self.level,
            "overdue": list(self.overdue),
        }

    @staticmethod
    def from_data(data: object) -> Conformal:
        """What `to_data` wrote; a fresh one from anything else."""
        if not isinstance(data, Mapping) or not isinstance(data.get("scores"), list):
            return Conformal()
        return Conformal(
            tuple(float(own) for own in data["scores"])[-WINDOW:],
            float(data.get("middle", 0.5)),
            float(data.get("level", LEVEL)),
            tuple(float(own) for own in data.get("overdue", ())),
        )
