"""Distributions of output lengths.

Kaplan–Meier over weighted endings; running requests and answers that a bound cut are censored
observations. Lengths are tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from qlm_batch.domain.jobs import EngineKind
from qlm_batch.scheduling.loops import loops
from qlm_batch.scheduling.worktable import EXCESS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

_LEVELS = (np.arange(EXCESS) + 0.5) / EXCESS


@dataclass(frozen=True, eq=False)
class LengthDistribution:
    """A discrete distribution: ascending `values` and their `probabilities`, which sum to 1."""

    values: Floats
    probabilities: Floats

    @cached_property
    def mean(self) -> float:
        """Expected length."""
        return float(self.values @ self.probabilities)

    @cached_property
    def var(self) -> float:
        """Variance of the length."""
        return max(0.0, float((self.values * self.values) @ self.probabilities) - self.mean**2)

    @cached_property
    def _up_to(self) -> Floats:
        """The chance of a length up to each value but the last."""
        return np.minimum(np.cumsum(self.probabilities[:-1]), 1.0)

    @cached_property
    def _beyond(self) -> tuple[Floats, Floats, Floats]:
        """Mass, first and second moment of all values from each one on, and zeros at the end."""
        first = self.probabilities * self.values
        moments = np.stack((self.probabilities, first, first * self.values))
        sums = np.zeros((3, self.values.size + 1))
        sums[:, :-1] = np.cumsum(moments[:, ::-1], axis=1)[:, ::-1]
        return sums[0], sums[1], sums[2]

    def capped(self, limit: float) -> LengthDistribution:
        """The distribution of min(length, limit)."""
        kept = int(np.searchsorted(self.values, limit))
        if kept == self.values.size:
            return self
        rest = self.probabilities[kept:].sum()
        return LengthDistribution(
            np.append(self.values[:kept], limit), np.append(self.probabilities[:kept], rest)
        )

    def capped_moments(self, limits: Floats) -> tuple[Floats, Floats]:
        """Mean and variance under each of these limits."""
        kept = np.searchsorted(self.values, limits)
        mass, first, second = self._beyond
        mean = first[0] - first[kept] + limits * mass[kept]
        square = second[0] - second[kept] + limits**2 * mass[kept]
        return mean, np.maximum(0.0, square - mean**2)

    def residual(self, age: float) -> tuple[float, float]:
        """Mean and variance of what is still to come after `age` tokens.

        Beyond everything seen so far, one more token.
        """
        ahead = self.values > age
        mass = float(self.probabilities[ahead].sum())
        if mass <= 0.0:
            return 1.0, 0.0
        rest = self.values[ahead] - age
        share = self.probabilities[ahead] / mass
        mean = float(rest @ share)
        return mean, max(0.0, float(rest**2 @ share) - mean**2)

    def residuals(self, ages: Sequence[float] | Floats) -> tuple[Floats, Floats]:
        """`residual` of each age."""
        given = np.asarray(ages, dtype=np.float64)
        ahead = np.searchsorted(self.values, given, side="right")
        mass, first, second = (sums[ahead] for sums in self._beyond)
        known = mass > 1e-12
        share = np.where(known, mass, 1.0)
        mean = first / share
        var = np.maximum(0.0, second / share - mean**2)
        return np.where(known, mean - given, 1.0), np.where(known, var, 0.0)

    def largest_of(self, count: float) -> float:
        """Expected largest of `count` independent lengths; `count` below 1 means 1."""
        return self._largest_of(count)[0]

    def largest_var(self, count: float) -> float:
        """Variance of the largest of `count` independent lengths."""
        return self._largest_of(count)[1]

    def _largest_of(self, count: float) -> tuple[float, float]:
        found = self._largest.get(count)
        if found is None:
            power, last = self._up_to ** max(1.0, count), float(self.values[-1])
            mean, second = ((last, last * last) - self._steps @ power).tolist()
            found = self._largest[count] = (mean, max(0.0, second - mean * mean))
        return found

    @cached_property
    def _largest(self) -> dict[float, tuple[float, float]]:
        """Mean and variance of the largest of so many, as asked so far."""
        return {}

    @cached_property
    def _steps(self) -> Floats:
        """From each value to the next, and from its square to the next one's."""
        return np.stack((np.diff(self.values), np.diff(self.values * self.values)))

    def largest_under(self, limits: Floats, counts: Ints) -> tuple[Floats, Floats]:
        """Mean and variance of the largest of so many lengths (at least 1) under each limit."""
        order = np.argsort(counts, kind="stable")
        kept = np.searchsorted(self.values, limits)
        mean, var = np.empty(counts.size), np.empty(counts.size)
        mean[order], var[order] = loops().largest(
            self.values, self._up_to, counts[order], kept[order], limits[order]
        )
        return mean, var

    @cached_property
    def equally_likely(self) -> Floats:
        """EXCESS lengths in ascending order, each as likely as the others."""
        reached = np.searchsorted(np.cumsum(self.probabilities), _LEVELS)
        found: Floats = self.values[np.minimum(reached, self.values.size - 1)]
        return found

    def mixed(self, weight: float, other: LengthDistribution, lean: float) -> LengthDistribution:
        """This distribution with `weight` beside `other` with weight `lean`."""
        values = np.concatenate((self.values, other.values))
        chances = np.concatenate((self.probabilities * weight, other.probabilities * lean))
        order = np.argsort(values, kind="stable")
        return LengthDistribution(values[order], chances[order] / (weight + lean))


def kaplan_meier(
    lengths: Sequence[float] | Floats,
    weights: Sequence[float] | Floats,
    ages: Sequence[float] | Floats = (),
    *,
    age_weight: float = 1.0,
    fading: float = 0.0,
    cut: Sequence[bool] | Flags = (),
    assumed: LengthDistribution | None = None,
    lean: float = 0.0,
) -> LengthDistribution:
    """Product-limit estimate from finished `lengths` and running requests of these `ages`.

    Those marked as `cut` would have been longer, nobody knows by how much. What is `assumed` counts
    as endings of weight `lean` in all (Susarla and Van Ryzin 1976): where nothing seen came as far
    as some length, it alone says what is beyond.

    `fading` discounts time at risk by exp(-fading · tokens generated since): a forgetting history
    holds only recent endings, so the risk it is divided by must be forgotten alike; else, in a
    steady state, running requests would count as survivors of a past that was dropped. What is
    left when the largest observation is a running one is put there (Efron 1967); when it is a cut
    one, at twice its length, the median guess for what is known only to go beyond.
    ValueError without any observation.
    """
    ended, mass = np.asarray(lengths, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    running = np.sort(np.asarray(ages, dtype=np.float64))
    if not ended.size and not running.size:
        raise ValueError("Kaplan–Meier needs at least one observation")
    outlived, outlived_mass = running, np.full(running.size, age_weight)
    furthest = float(max(ended.max(initial=0.0), running.max(initial=0.0)))
    leaned = np.zeros(ended.size)
    if len(cut):
        bounded = np.asarray(cut, dtype=np.bool_)
        outlived = np.concatenate((running, ended[bounded]))
        outlived_mass = np.concatenate((outlived_mass, mass[bounded]))
        order = np.argsort(outlived, kind="stable")
        outlived, outlived_mass = outlived[order], outlived_mass[order]
        if ended[bounded].max(initial=-1.0) >= furthest:
            furthest *= 2.0
        ended, mass, leaned = ended[~bounded], mass[~bounded], leaned[~bounded]
    if assumed is not None:
        ended = np.concatenate((ended, assumed.values))
        mass = np.concatenate((mass, np.zeros(assumed.values.size)))
        leaned = np.concatenate((leaned, lean * assumed.probabilities))
        furthest = max(furthest, float(assumed.values[-1]))
    order = np.argsort(ended)
    return LengthDistribution(
        *loops().survival(
            ended[order], mass[order], leaned[order], outlived, outlived_mass, fading, furthest
        )
    )


@lru_cache
def prior(kind: EngineKind) -> LengthDistribution:
    """What is assumed before anything was seen: chat-like lengths, or none for embeddings.

    Log-normal with the median (128) and 95th percentile (730) of ShareGPT outputs.
    """
    if kind is EngineKind.EMBED:
        return LengthDistribution(np.zeros(1), np.ones(1))
    points = 24
    normal = NormalDist(np.log(128.0), np.log(730.0 / 128.0) / NormalDist().inv_cdf(0.95))
    values = np.exp([normal.inv_cdf((i + 0.5) / points) for i in range(points)])
    return LengthDistribution(values, np.full(points, 1.0 / points))


@dataclass(frozen=True, slots=True, eq=False)
class Ages:
    """Output tokens so far of running requests: each of `begun` stands for `weight` of them.

    `running` counts them all, those without a token yet included.
    """

    begun: Floats
    weight: float
    running: int

    @staticmethod
    def of(ages: Sequence[int]) -> Ages:
        """These ages, each for itself."""
        given = np.asarray(ages, dtype=np.float64)
        return Ages(given[given > 0.0], 1.0, given.size)


NO_AGES = Ages.of(())
