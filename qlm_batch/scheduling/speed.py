"""How fast a model runs on a device: step time = base + b·sequences + c·kv tokens + p·prefill.

Fitted by recursive least squares with forgetting, in information form: the Gram matrix and the
moments are what is remembered, and a prior keeps directions that were never excited where they
were. Where an engine shows no steps, its measured throughput stands in. Times are seconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
StepRow = tuple[int, int, int, float]
Amount = TypeVar("Amount", float, Floats)

FORGET = 0.999
"""What one newer step leaves of a weight: an effective window of 1,000 steps."""
RATE_WINDOW_S = 30.0
"""Busy seconds after which measured throughput has forgotten two thirds."""
MIN_STEPS = 16.0
MIN_BUSY_S = 1.0

_SCALE: Final[Floats] = np.array([1.0, 32.0, 16_384.0, 512.0])
_PRIOR_ROWS = 0.01
"""What the prior weighs, in steps of full scale. Prompts of a few dozen tokens make steps of a
small part of it, and have to outweigh the prior all the same."""
_OUTLIER = 5.0


@dataclass(frozen=True, slots=True)
class StepTime:
    """Coefficients in seconds: per step, sequence, key-value token and prefill token."""

    base: float
    per_sequence: float
    per_kv: float
    per_prefill: float

    def seconds(self, sequences: Amount, kv: Amount, prefill: Amount) -> Amount:
        """Time of one step, or of each."""
        return (
            self.base
            + self.per_sequence * sequences
            + self.per_kv * kv
            + self.per_prefill * prefill
        )

    def times(self, factor: float) -> StepTime:
        """Steps that take `factor` times as long."""
        return StepTime(
            self.base * factor,
            self.per_sequence * factor,
            self.per_kv * factor,
            self.per_prefill * factor,
        )


# Published profiles and fits: device pattern, billions of parameters, milliseconds. The A10 rows
# and those of the unnamed device and the CPU are extrapolated.
_TABLE: Final[tuple[tuple[str, float, StepTime], ...]] = (
    ("h100|h200|h800", 7.0, StepTime(6.6e-3, 4.4e-6, 2.0e-7, 2.0e-5)),
    ("h100|h200|h800", 70.0, StepTime(29.3e-3, 2.4e-4, 1.45e-7, 7.0e-5)),
    ("a100|a800", 7.0, StepTime(10.2e-3, 4.4e-6, 3.0e-7, 6.3e-5)),
    ("a100|a800", 13.0, StepTime(23.5e-3, 6.1e-5, 5.9e-7, 1.4e-4)),
    ("a100|a800", 70.0, StepTime(43.6e-3, 2.0e-4, 3.7e-7, 1.5e-4)),
    ("a10", 7.0, StepTime(32.0e-3, 4.4e-6, 1.0e-6, 1.54e-4)),
    ("cpu|simulated", 0.1, StepTime(5.0e-3, 2.0e-4, 1.0e-7, 2.0e-5)),
    ("", 7.0, StepTime(20.0e-3, 2.0e-5, 6.0e-7, 1.0e-4)),
)


@lru_cache(maxsize=1024)
def prior_step_time(model: str, device: str) -> StepTime:
    """What to expect of a pair not seen yet, from the nearest published one of its device.

    The size is read from the model's name (`…-7B`); without one, the device's smallest is taken.
    """
    named = re.search(r"(\d+(?:\.\d+)?)b(?![a-z])", model.lower())
    rows = [
        (size, step)
        for pattern, size, step in _TABLE
        if re.search(rf"(?<![a-z0-9])(?:{pattern})(?![0-9])", device.lower())
    ]
    if not named:
        return rows[0][1]
    wanted = max(0.01, float(named[1]))
    size, step = min(rows, key=lambda row: abs(np.log(row[0] / wanted)))
    # Reading weights dominates a step, and weights grow with the size.
    return step.times(wanted / size)


@dataclass(frozen=True, slots=True)
class Speed:
    """What was learned about one (model, device), beside the `prior` it started from.

    `gram` (row-major 4×4) and `moment` are the forgotten sums over steps, in scaled units;
    `steps` their weight. `tokens`, `requests` and `busy_s` are forgotten sums of measured
    throughput. `efficiency` is measured over modelled token rate: what an engine loses between
    its steps; 1 while unknown.
    """

    prior: StepTime
    gram: tuple[float, ...] = (0.0,) * 16
    moment: tuple[float, ...] = (0.0,) * 4
    steps: float = 0.0
    tokens: float = 0.0
    requests: float = 0.0
    busy_s: float = 0.0
    efficiency: float = 1.0

    @property
    def fitted(self) -> bool:
        """Whether enough steps were seen to trust their fit."""
        return self.steps >= MIN_STEPS

    @property
    def measured(self) -> bool:
        """Whether enough busy time was seen to trust the throughput."""
        return self.busy_s >= MIN_BUSY_S

    @property
    def unknown(self) -> float:
        """How much of it is the prior's, 1 or less as steps or busy time are seen."""
        return min(
            MIN_STEPS / max(MIN_STEPS, self.steps), MIN_BUSY_S / max(MIN_BUSY_S, self.busy_s)
        )

    @property
    def rate_only(self) -> bool:
        """Whether the throughput is all there is to go by: the engine shows no steps."""
        return self.measured and not self.fitted

    def step_time(self) -> StepTime:
        """The present fit; coefficients that would come out negative are held at zero."""
        return _fitted(self.prior, self.gram, self.moment)

    def after_steps(self, rows: Sequence[StepRow]) -> Speed:
        """The speed after these steps, oldest first; rows that took no time are left out."""
        seen = np.array([row for row in rows if row[3] > 0.0], dtype=np.float64).reshape(-1, 4)
        if not len(seen):
            return self
        x = np.column_stack((np.ones(len(seen)), seen[:, :3])) / _SCALE
        y = seen[:, 3]
        if self.fitted:
            # A compilation or a descheduled process must not bend the fit for a thousand steps.
            now = self.step_time()
            told = np.array([now.base, now.per_sequence, now.per_kv, now.per_prefill]) * _SCALE
            y = np.minimum(y, _OUTLIER * np.maximum(x @ told, 1e-6))
        weight = FORGET ** np.arange(len(seen) - 1, -1, -1, dtype=np.float64)
        kept = FORGET ** len(seen)
        gram = np.array(self.gram).reshape(4, 4) * kept + (x * weight[:, None]).T @ x
        moment = np.array(self.moment) * kept + x.T @ (weight * y)
        return replace(
            self,
            gram=tuple(gram.ravel().tolist()),
            moment=tuple(moment.tolist()),
            steps=self.steps * kept + float(weight.sum()),
        )

    def after_busy(
        self, tokens: int, requests: int, seconds: float, rows: Sequence[StepRow]
    ) -> Speed:
        """The speed after `seconds` of work brought `tokens` and `requests`, in steps like `rows`.

        `rows` may be a sample; call after `after_steps`.
        """
        if seconds <= 0.0 or (tokens <= 0 and requests <= 0):
            return self
        kept = float(np.exp(-seconds / RATE_WINDOW_S))
        busy_s = self.busy_s * kept + seconds
        efficiency = self.efficiency
        sequences = sum(row[0] for row in rows)
        if self.fitted and tokens > 0 and sequences > 0:
            step = self.step_time()
            modelled_s = sum(step.seconds(row[0], row[1], row[2]) for row in rows)
            ratio = (tokens / seconds) / (sequences / max(modelled_s, 1e-9))
            share = seconds / (MIN_BUSY_S + busy_s)
            efficiency += share * (min(1.25, max(0.05, ratio)) - efficiency)
        return replace(
            self,
            tokens=self.tokens * kept + tokens,
            requests=self.requests * kept + requests,
            busy_s=busy_s,
            efficiency=efficiency,
        )

    def to_data(self) -> Mapping[str, object]:
        """As plain JSON values, without the prior."""
        return {
            "gram": list(self.gram),
            "moment": list(self.moment),
            "steps": self.steps,
            "tokens": self.tokens,
            "requests": self.requests,
            "busy_s": self.busy_s,
            "efficiency": self.efficiency,
        }

    @staticmethod
    def from_data(prior: StepTime, data: object) -> Speed:
        """What `to_data` wrote, over this prior; the bare prior from anything else."""
        if not isinstance(data, Mapping):
            return Speed(prior)
        gram, moment = _floats(data.get("gram")), _floats(data.get("moment"))
        if len(gram) != 16 or len(moment) != 4:
            return Speed(prior)
        steps, tokens, requests, busy_s, efficiency = (
            float(data.get(name, default))
            for name, default in (
                ("steps", 0.0),
                ("tokens", 0.0),
                ("requests", 0.0),
                ("busy_s", 0.0),
                ("efficiency", 1.0),
            )
        )
        return Speed(prior, gram, moment, steps, tokens, requests, busy_s, efficiency)


@lru_cache(maxsize=1024)
def _fitted(prior: StepTime, rows: tuple[float, ...], moments: tuple[float, ...]) -> StepTime:
    gram = np.array(rows).reshape(4, 4) + _PRIOR_ROWS * np.eye(4)
    start = np.array([prior.base, prior.per_sequence, prior.per_kv, prior.per_prefill])
    moment = np.array(moments) + _PRIOR_ROWS * start * _SCALE
    free = np.ones(4, dtype=np.bool_)
    theta = np.zeros(4)
    while free.any():
        theta[:] = 0.0
        theta[free] = np.linalg.solve(gram[np.ix_(free, free)], moment[free])
        if theta.min() >= 0.0:
            break
        free[int(theta.argmin())] = False
    base, per_sequence, per_kv, per_prefill = (theta / _SCALE).tolist()
    return StepTime(base, per_sequence, per_kv, per_prefill)


def _floats(data: object) -> tuple[float, ...]:
    return tuple(float(value) for value in data) if isinstance(data, list | tuple) else ()
