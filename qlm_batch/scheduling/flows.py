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
from qlm_batch.scheduling.speed import Speed, StepTime

Floats = NDArray[np.float64]

EPSILON_S = 1e-6
"""The shortest duration that is told apart from none."""
_GRID = 1.1
_LOG_GRID = math.log(_GRID)

Shape = tuple[str, EngineKind, str, int, int]
"""Model, kind, tenant, and the grid points of mean prompt and output limit."""


@dataclass(frozen=True, slots=True)
class Flow:
    """One kind of work at one instance, saturated: `running` at once, a step each `step_s`.

    `request_s` and `request_var` are what one request adds to the instance's occupation. `base_s`
    is the part of a step that does not depend on how many run.
    """

    running: float
    step_s: float
    base_s: float
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

    @property
    def excess_s(self) -> Floats:
        """How much later than a request of mean length one ends: equally likely values."""
        return (self.lengths.equally_likely - self.lengths.mean) * self.step_s

    def last(self, requests: int, inside: float) -> tuple[float, float]:
        """How long the longest of so many takes where `inside` run at once: mean and variance."""
        full = min(1.0, inside / self.running)
        step_s = self.base_s + (self.step_s - self.base_s) * full
        count = few(max(1, min(requests, round(self.running))))
        return (
            self.lengths.largest_of(count) * step_s,
            self.lengths.largest_var(count) * step_s**2,
        )

    def tail_s(self, requests: float) -> float:
        """How much later than its occupation a group's last request is expected to end."""
        last = min(max(1.0, requests), self.running)
        # The largest grows with the logarithm of how many there are: a coarse number will do.
        alone_s = self.lengths.largest_of(few(round(last))) * self.step_s
        return max(0.0, alone_s - last * self.request_s)


def saturated(
    speed: Speed,
    step: StepTime,
    lengths: LengthDistribution,
    prompt: float,
    slots: int,
    kv_tokens: int,
    kind: EngineKind,
) -> Flow:
    """The steady state of a full instance: every step one token each, ended ones replaced at once.

    A running request holds its prompt and, by the inspection paradox, E[L²] / 2 E[L] output tokens.
    """
    mean = max(1.0, lengths.mean)
    second = lengths.var + lengths.mean**2
    held = prompt + (second / (2.0 * mean) if kind is EngineKind.GENERATE else 0.0)
    running = float(max(1, slots))
    if kv_tokens > 0:
        running = max(1.0, min(running, kv_tokens / max(1.0, held)))
    base_s = math.inf
    if not speed.fitted and speed.measured:
        if speed.tokens > 0.0 and kind is EngineKind.GENERATE:
            step_s = running * speed.busy_s / speed.tokens
        else:
            step_s = running * mean * speed.busy_s / max(1.0, speed.requests)
    else:
        seconds = step.seconds(running, running * held, running * prompt / mean)
        step_s = seconds / speed.efficiency
        base_s = step.base / speed.efficiency
    step_s = max(EPSILON_S, step_s)
    per_token = step_s / running
    base_s = min(base_s, step_s)
    return Flow(running, step_s, base_s, mean * per_token, lengths.var * per_token**2, lengths)


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


def to_grids(tokens: Floats) -> list[int]:
    """`to_grid` of each."""
    points: list[int] = (
        np.rint(np.log(np.maximum(1.0, tokens)) / _LOG_GRID).astype(np.int64).tolist()
    )
    return points


def to_grid(tokens: float) -> int:
    """Tokens on a 10 % grid."""
    return round(math.log(max(1.0, tokens)) / _LOG_GRID)


def from_grid(point: int) -> float:
    """Tokens at a point of the grid."""
    return float(_GRID**point)
