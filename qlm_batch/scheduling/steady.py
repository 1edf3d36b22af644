"""Much work at full instances at once: the same flows as one by one, worked out over arrays.

Work of one shape shares a row. Lengths are asked of a distribution for all limits of a tenant's
work together, and the steady state for all rows of a model on one class of instances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qlm_batch.domain.jobs import EngineKind
from qlm_batch.domain.snapshot import AssignedView, RequestGroup
from qlm_batch.scheduling.expectations import ExpectedLengths
from qlm_batch.scheduling.fleet import Fleet
from qlm_batch.scheduling.flows import fews, from_grids, saturated, to_grids, unshared
from qlm_batch.scheduling.speed import Speed, StepTime
from qlm_batch.scheduling.worktable import Floats, Ints

SpeedOf = Callable[[str, str], tuple[Speed, StepTime]]
"""By model and device."""
Source = tuple[str, EngineKind, str]
"""Whose lengths some work has: model, kind and tenant."""


class Lasts(NamedTuple):
    """When the longest of some requests end after their start, as mean and variance, seconds.

    `together`: all that is inside the instance runs at once; else it is full, and interactive work
    slows it down.
    """

    mean: Floats
    var: Floats
    together: NDArray[np.bool_]


@dataclass(slots=True, eq=False)
class Flows:
    """By row and class of instances; where `served` is false the rest says nothing.

    As in `Flow`: `running` at once, a step each `step_s`, of which `base_s` does not depend on how
    many run; `request_s` and `request_var` are what one request adds to the occupation.
    """

    served: NDArray[np.bool_]
    running: Floats
    step_s: Floats
    base_s: Floats
    request_s: Floats
    request_var: Floats


@dataclass(slots=True, eq=False)
class Rows:
    """Shapes: mean prompt and output limit, and mean and variance of the lengths below it.

    Rows `bounds[n] : bounds[n + 1]` have the lengths of `sources[n]`; these are in order.
    """

    sources: Sequence[Source]
    bounds: Ints
    prompt: Floats
    limit: Floats
    mean: Floats
    var: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Steady:
    """Some work as it would run: the row (`kind`) of each, and rows with their flows.

    `factor` is how many usual requests of its shape one of each work's is, going by its prompts.
    """

    requests: Floats
    kind: Ints
    factor: Floats
    rows: Rows
    flows: Flows
    expected: ExpectedLengths

    def largest(self, kind: Ints, count: Ints) -> tuple[Floats, Floats]:
        """Mean and variance of the largest of so many lengths, at least 1, of each row."""
        first, which = distinct(kind, count)
        row, count = kind[first], count[first]
        mean, var = np.empty(row.size), np.empty(row.size)
        for own, source in stretches(self.rows.sources, np.searchsorted(row, self.rows.bounds)):
            lengths = self.expected.of(*source)
            mean[own], var[own] = lengths.largest_under(self.rows.limit[row[own]], count[own])
        return mean[which], var[which]

    def tails(self, kind: Ints, place: Ints, last: Ints) -> Floats:
        """How much later than its occupation the last of so many requests ends; see `Flow.tail_s`.

        Of these rows at these classes; inf where not served.
        """
        flows, at = self.flows, (kind, place)
        inside = np.minimum(np.maximum(1, last), flows.running[at])
        longest, _ = self.largest(kind, fews(inside))
        tails = np.maximum(0.0, longest * flows.step_s[at] - inside * flows.request_s[at])
        return np.where(flows.served[at], tails, np.inf)

    def lasts(
        self, work: Ints, place: Ints, slow: Floats, requests: Floats, inside: Floats
    ) -> Lasts:
        """How long the longest of so many requests of this work takes.

        At instances of these classes, each as `slow` as in `Fleet`, that hold `inside` requests.
        """
        flows, kind = self.flows, self.kind[work]
        at = (kind, place)
        running, step_s, base_s = flows.running[at], flows.step_s[at], flows.base_s[at]
        together = inside <= running
        step_s = base_s + (step_s - base_s) * np.minimum(1.0, inside / running)
        asked = np.where(together, requests, fews(requests))
        count = fews(np.maximum(1.0, np.minimum(asked, np.rint(running))))
        mean, var = self.largest(kind, count)
        scale = step_s * self.factor[work] * np.where(together, 1.0, slow)
        return Lasts(mean * scale, var * scale**2, together)


def steady(
    work: Sequence[RequestGroup | AssignedView],
    sources: Sequence[Source],
    fleet: Fleet,
    expected: ExpectedLengths,
    speed_of: SpeedOf,
) -> Steady:
    """How work, each of its source, would run at each class of instances."""
    requests = np.array([own.requests for own in work], dtype=np.float64)
    count = np.maximum(1.0, requests)
    prompt = to_grids(np.array([own.prompt_tokens for own in work]) / count)
    cap = to_grids(np.array([own.max_tokens for own in work]) / count)
    index = {source: n for n, source in enumerate(sorted(set(sources)))}
    source = np.array([index[own] for own in sources], dtype=np.int64)
    first, kind = distinct(source, prompt, cap)
    bounds = np.searchsorted(source[first], np.arange(len(index) + 1))
    rows = _rows(tuple(index), bounds, prompt[first], cap[first], expected)
    factor = _factors(work, sources, rows, kind, expected)
    return Steady(requests, kind, factor, rows, _flows(rows, fleet, speed_of), expected)


def distinct(*columns: Ints) -> tuple[Ints, Ints]:
    """The first place of each distinct row of these columns, and which of these each row is.

    In ascending order.
    """
    key = columns[0]
    for column in columns[1:]:
        key = key * (int(column.max(initial=0)) + 1) + column
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    return first, inverse


def stretches(sources: Sequence[Source], bounds: Ints) -> Iterator[tuple[slice, Source]]:
    """Each source, with the rows between its bounds, that has any."""
    each = bounds.tolist()
    for source, start, stop in zip(sources, each[:-1], each[1:], strict=True):
        if start < stop:
            yield slice(start, stop), source


def _rows(
    sources: Sequence[Source], bounds: Ints, prompt: Ints, cap: Ints, expected: ExpectedLengths
) -> Rows:
    limit = np.maximum(1.0, from_grids(cap))
    rows = Rows(
        sources, bounds, from_grids(prompt), limit, np.empty(limit.size), np.empty(limit.size)
    )
    for own, source in stretches(sources, bounds):
        rows.mean[own], rows.var[own] = expected.of(*source).capped_moments(limit[own])
    return rows


def _flows(rows: Rows, fleet: Fleet, speed_of: SpeedOf) -> Flows:
    shape = (rows.limit.size, len(fleet.members))
    flows = Flows(np.zeros(shape, dtype=np.bool_), *(np.ones(shape) for _ in range(5)))
    numbered = enumerate(rows.sources)
    for (model, kind), members in groupby(numbered, key=lambda entry: entry[1][:2]):
        which = [n for n, _ in members]
        own = slice(int(rows.bounds[which[0]]), int(rows.bounds[which[-1] + 1]))
        mean, var, prompt = rows.mean[own], rows.var[own], rows.prompt[own]
        for servers in fleet.servers(model):
            at = int(servers[0])
            view, place = fleet.instances[at], fleet.class_of[at]
            speed, step = speed_of(fleet.roots[model], view.device)
            running, step_s = saturated(
                speed, step, mean, var, prompt, view.slots, view.kv_tokens, kind
            )
            per_token = step_s / running
            flows.served[own, place] = True
            flows.running[own, place], flows.step_s[own, place] = running, step_s
            flows.base_s[own, place] = unshared(speed, step, step_s)
            flows.request_s[own, place] = np.maximum(1.0, mean) * per_token
            flows.request_var[own, place] = var * per_token**2
    return flows


def _factors(
    work: Sequence[RequestGroup | AssignedView],
    sources: Sequence[Source],
    rows: Rows,
    kind: Ints,
    expected: ExpectedLengths,
) -> Floats:
    """How many usual requests of its shape one of each work's is, going by its prompts."""
    factors = np.ones(len(work))
    told = [n for n, own in enumerate(work) if own.prompts]
    if told:
        own = kind[told]
        most = rows.limit[own] / np.maximum(1.0, rows.mean[own])
        factors[told] = np.minimum(
            np.maximum(1.0, most),
            [expected.of_prompts(sources[n][0], sources[n][2], work[n].prompts) for n in told],
        )
    return factors
