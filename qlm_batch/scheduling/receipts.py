"""How well promises held: the reliability of the p50 and p95 shown when batches were accepted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from qlm_batch.domain.jobs import Batch

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_LEAST_S = 1e-3


@dataclass(frozen=True, slots=True)
class Receipt:
    """A promise and its outcome, in seconds from when it was made; `actual_s` inf: it expired."""

    batch_id: str
    p50_s: float
    p95_s: float
    actual_s: float

    @property
    def level(self) -> float:
        """Where the outcome fell in what was promised, in [0, 1].

        Promised is the log-normal distribution with these two quantiles.
        """
        if not math.isfinite(self.actual_s):
            return 1.0
        middle, high = max(_LEAST_S, self.p50_s), max(2 * _LEAST_S, self.p95_s)
        spread = max(1e-6, math.log(high / middle) / NormalDist().inv_cdf(0.95))
        off = math.log(max(_LEAST_S, self.actual_s) / middle) / spread
        return NormalDist().cdf(off)


@dataclass(frozen=True, slots=True)
class Reliability:
    """Of `count` promises the shares done by their p50 and p95, and of each level.

    `curve` holds (level, share of outcomes at or below it): equal where promises are calibrated.
    `error` is the greatest difference between the two.
    """

    count: int
    by_p50: float
    by_p95: float
    curve: tuple[tuple[float, float], ...]

    @property
    def error(self) -> float:
        """The greatest distance between a level and its share."""
        return max((abs(level - share) for level, share in self.curve), default=0.0)


def receipt(batch: Batch) -> Receipt | None:
    """The batch's receipt; None without a promise, or where it says nothing of waiting.

    Batches that were cancelled, failed or run again are not comparable with what was promised.
    """
    promise = batch.promise
    if promise is None or promise.p50 is None or promise.p95 is None or batch.generation > 1:
        return None
    ended = batch.completed_at
    if ended is None and batch.expired_at is None:
        return None
    return Receipt(
        batch.id,
        promise.p50 - promise.made_at,
        promise.p95 - promise.made_at,
        math.inf if ended is None else ended - promise.made_at,
    )


def reliability(receipts: Iterable[Receipt]) -> Reliability:
    """What these receipts say together; shares are 0 where there are none."""
    own = tuple(receipts)
    return Reliability(
        len(own),
        _share([r.actual_s <= r.p50_s for r in own]),
        _share([r.actual_s <= r.p95_s for r in own]),
        tuple((level, _share([r.level <= level for r in own])) for level in LEVELS) if own else (),
    )


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits) if hits else 0.0
