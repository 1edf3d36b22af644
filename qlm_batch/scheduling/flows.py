"""A full instance as a flow: how many requests run at once, and what each adds to its occupation.

Work comes in shapes: groups that share model, kind and tenant, with prompts and output limits on
the same points of a 10 % grid, share all their estimates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from qlm_batch.domain.jobs import EngineKind
from qlm_batch.domain.snapshot import AssignedView, ModelView, RequestGroup
from qlm_batch.scheduling.lengths import LengthDistribution
from qlm_batch.scheduling.speed import Amount, Speed, StepTime

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

EPSILON_S = 1e-6
"""The shortest duration that is told apart from none."""
_GRID = 1.1
_LOG_GRID = math.log(_GRID)
_LOG_FEW = math.log(1.25)

Shape = tuple[str, EngineKind, str, int, int]
"""Model, kind, tenant, and the grid points of mean prompt and output limit."""


@dataclass(frozen=True, slots=True)
class Flow:
    """One kind of work at one instance, saturated: `running` at once, a step each `step_s`.

    `request_s` and `request_var` are what one request adds to the instance's occupation.
    """

    running: float
    step_s: float
    request_s: float
    request_var: float
    lengths: LengthDistribution

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second: the paper's Θ."""
        return self.running / self.step_s

    @property
    def requests_per_s(self) -> float:
        """Requests per second."""
        return 1.0 / self.request_s

    def tail_s(self, requests: float) -> float:
        """How much later than its occupation a group's last request is expected to end."""
        last = min(max(1.0, requests), self.running)
        # The largest grows with the logarithm of how many there are: a coarse number will do.
        alone_s = self.lengths.largest_of(few(round(last))) * self.step_s
        return max(0.0, alone_s - last * self.request_s)


def saturated(
    speed: Speed,
    step: StepTime,
    mean: Amount,
    var: Amount,
    prompt: Amount,
    slots: int,
    kv_tokens: int,
    kind: EngineKind,
) -> tuple[Amount, Amount]:
    """The steady state of a full instance: every step one token each, ended ones replaced at once.

    Requests running at once, and the time of a step, for kinds of work whose output lengths have
    this mean and variance. A running request holds its prompt and, by the inspection paradox,
    E[L²] / 2 E[L] output tokens.
    """
    second, mean = var + mean * mean, _least(1.0, mean)
    held = prompt + second / (2.0 * mean) if kind is EngineKind.GENERATE else prompt
    running = 0.0 * mean + float(max(1, slots))
    if kv_tokens > 0:
        running = _least(1.0, _most(running, kv_tokens / _least(1.0, held)))
    if speed.rate_only:
        if speed.tokens > 0.0 and kind is EngineKind.GENERATE:
            step_s = running * speed.busy_s / speed.tokens
        else:
            step_s = running * mean * speed.busy_s / max(1.0, speed.requests)
    else:
        seconds = step.seconds(running, running * held, running * prompt / mean)
        step_s = seconds / speed.efficiency
    return running, _least(EPSILON_S, step_s)


def _least(bound: float, values: Amount) -> Amount:
    """The values, or of each the bound where it is less."""
    return max(bound, values) if isinstance(values, float) else np.maximum(bound, values)


def _most(values: Amount, bounds: Amount) -> Amount:
    """The values, or of each its bound where it is more."""
    return min(values, bounds) if isinstance(values, float) else np.minimum(values, bounds)


def unshared(speed: Speed, step: StepTime, step_s: Floats) -> Floats:
    """The part of each of these steps that does not depend on how many run."""
    if speed.rate_only:
        return step_s
    return np.minimum(step_s, step.base / speed.efficiency)


def shape_of_group(group: RequestGroup) -> Shape:
    """The kind of work a group is."""
    count = max(1, group.requests)
    prompt, most = group.prompt_tokens / count, group.max_tokens / count
    return (group.model, group.kind, group.tenant, to_grid(prompt), to_grid(most))


def shape_of_assigned(own: AssignedView, model: ModelView) -> Shape:
    """The kind of work something already at an instance is."""
    count = max(1, own.requests)
    prompt, most = own.prompt_tokens / count, own.max_tokens / count
    return (own.model, model.kind, own.tenant, to_grid(prompt), to_grid(most))


@lru_cache(maxsize=4096)
def few(count: int) -> int:
    """A number of requests, above 8 on a 25 % grid, so that tails are shared."""
    return count if count <= 8 else round(1.25 ** round(math.log(count, 1.25)))


def fews(counts: Floats) -> Ints:
    """`few` of each, rounded first."""
    exact = np.rint(counts)
    coarse = np.rint(1.25 ** np.rint(np.log(np.maximum(1.0, exact)) / _LOG_FEW))
    found: Ints = np.where(exact <= 8.0, exact, coarse).astype(np.int64)
    return found


def to_grids(tokens: Floats) -> Ints:
    """`to_grid` of each."""
    points: Ints = np.rint(np.log(np.maximum(1.0, tokens)) / _LOG_GRID).astype(np.int64)
    return points


def to_grid(tokens: float) -> int:
    """Tokens on a 10 % grid."""
    return round(math.log(max(1.0, tokens)) / _LOG_GRID)


def from_grids(points: Ints) -> Floats:
    """`from_grid` of each."""
    tokens = np.array([from_grid(point) for point in range(int(points.max(initial=0)) + 1)])
    return tokens[points]


def from_grid(point: int) -> float:
    """Tokens at a point of the grid."""
    return float(_GRID**point)
