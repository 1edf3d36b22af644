"""Output lengths: what finished and running requests say about those still to come.

Kaplan–Meier over an exponentially forgotten history, with running requests as censored
observations. A tenant's history leans on its model's, and that one on a prior, in proportion to
how much each has seen. Lengths are tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from qlm_batch.domain.jobs import EngineKind
from qlm_batch.scheduling.kernels import loops

Floats = NDArray[np.float64]

DECAY = 0.992
"""What one newer observation leaves of a weight: an effective window of 125 observations."""
HISTORY = 400
"""Lengths kept per model; the oldest of them weighs 0.992^399, 0.04."""
TENANTS = 32
"""Tenants remembered apart per model, the most recent ones."""
TENANT_HISTORY = 200
LEAN_ON_MODEL = 16.0
"""Observations' worth of a model's distribution inside a tenant's."""
LEAN_ON_PRIOR = 8.0
"""Observations' worth of the prior inside a model's."""


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
        power = self._up_to ** max(1.0, count)
        return float(self.values[-1] - np.diff(self.values) @ power)

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
) -> LengthDistribution:
    """Product-limit estimate from finished `lengths` and running requests of these `ages`.

    `fading` discounts time at risk by exp(-fading · tokens generated since): a forgetting history
    holds only recent endings, so the risk it is divided by must be forgotten alike; else, in a
    steady state, running requests would count as survivors of a past that was dropped. What is
    left when the largest observation is a running one is put there (Efron 1967).
    ValueError without any observation.
    """
    finished = np.asarray(lengths, dtype=np.float64)
    running = np.sort(np.asarray(ages, dtype=np.float64))
    if not finished.size and not running.size:
        raise ValueError("Kaplan–Meier needs at least one observation")
    order = np.argsort(finished)
    mass = np.asarray(weights, dtype=np.float64)[order]
    return LengthDistribution(*loops().survival(finished[order], mass, running, age_weight, fading))


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


def _weights(count: int) -> Floats:
    newest_last: Floats = DECAY ** np.arange(count - 1, -1, -1, dtype=np.float64)
    return newest_last


@dataclass(frozen=True, slots=True)
class LengthBook:
    """The lengths one model's requests finished with, newest last, overall and by tenant."""

    lengths: tuple[int, ...] = ()
    tenants: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def seen(self, outputs: Iterable[tuple[str, int]]) -> LengthBook:
        """The book after (tenant, length) pairs in the order they finished."""
        lengths = list(self.lengths)
        tenants = {name: list(own) for name, own in self.tenants.items()}
        for tenant, length in outputs:
            lengths.append(length)
            # Taken out and put back: a dict keeps order, so the least recent tenant stands first.
            own = tenants.pop(tenant, [])
            own.append(length)
            tenants[tenant] = own
        recent = list(tenants.items())[-TENANTS:]
        return LengthBook(
            tuple(lengths[-HISTORY:]),
            {name: tuple(own[-TENANT_HISTORY:]) for name, own in recent},
        )

    def distribution(
        self,
        kind: EngineKind,
        tenant: str | None = None,
        ages: Ages = NO_AGES,
        of_model: LengthDistribution | None = None,
    ) -> LengthDistribution:
        """The lengths to expect, given the `ages` of this model's running requests.

        Without a tenant, or for one not seen yet, the model's own distribution: `of_model`, where
        the caller has it.
        """
        if of_model is None:
            of_model = prior(kind)
            if self.lengths:
                own = self._estimate(self.lengths, ages, 1.0)
                weight = float(_weights(len(self.lengths)).sum())
                of_model = own.mixed(weight, of_model, LEAN_ON_PRIOR)
        history = self.tenants.get(tenant or "")
        if not history:
            return of_model
        share = min(1.0, len(history) / len(self.lengths)) if self.lengths else 1.0
        own = self._estimate(history, ages, share)
        return own.mixed(float(_weights(len(history)).sum()), of_model, LEAN_ON_MODEL)

    @staticmethod
    def _estimate(history: tuple[int, ...], ages: Ages, share: float) -> LengthDistribution:
        lengths, weights = np.array(history, dtype=np.float64), _weights(len(history))
        mean = max(1.0, float(weights @ lengths) / float(weights.sum()))
        # Little's law: while one request produces a token, running/mean requests finish.
        fading = (1.0 - DECAY) * ages.running * share / mean
        # The ages stand for the tenant's share of them.
        return kaplan_meier(
            lengths, weights, ages.begun, age_weight=share * ages.weight, fading=fading
        )

    def to_data(self) -> Mapping[str, object]:
        """As plain JSON values."""
        return {
            "lengths": list(self.lengths),
            "tenants": {name: list(own) for name, own in self.tenants.items()},
        }

    @staticmethod
    def from_data(data: object) -> LengthBook:
        """The book `to_data` wrote; an empty one from anything else."""
        if not isinstance(data, Mapping):
            return LengthBook()
        tenants = data.get("tenants")
        return LengthBook(
            _ints(data.get("lengths"))[-HISTORY:],
            {str(name): _ints(own) for name, own in tenants.items()}
            if isinstance(tenants, Mapping)
            else {},
        )


def _ints(data: object) -> tuple[int, ...]:
    return tuple(int(value) for value in data) if isinstance(data, list | tuple) else ()
