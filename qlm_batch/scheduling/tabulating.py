"""Durations of many groups at once: the same flows as one by one, worked out over arrays.

Groups of one shape share a row. Lengths are asked of a distribution for all limits of a tenant's
work together, and the steady state for all rows of a model on one class of instances.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qlm_batch.domain.jobs import EngineKind
from qlm_batch.domain.snapshot import RequestGroup
from qlm_batch.scheduling.expectations import ExpectedLengths
from qlm_batch.scheduling.fleet import Fleet
from qlm_batch.scheduling.flows import fews, from_grids, saturated, to_grids
from qlm_batch.scheduling.speed import Speed, StepTime
from qlm_batch.scheduling.worktable import EXCESS, Floats, Ints, WorkTable

SpeedOf = Callable[[str, str], tuple[Speed, StepTime]]
"""By model and device."""
_Source = tuple[str, EngineKind, str]


@dataclass(slots=True, eq=False)
class _Rows:
    """Shapes: whose lengths (`source`), mean prompts, limits, and what follows from these."""

    source: Ints
    prompt: Floats
    limit: Floats
    mean: Floats
    var: Floats
    likely: Floats


@dataclass(slots=True, eq=False)
class _Flows:
    """By row and class of instances; where `served` is false the rest says nothing."""

    served: NDArray[np.bool_]
    running: Floats
    step_s: Floats
    request_s: Floats
    request_var: Floats


def tabulated(
    groups: Sequence[RequestGroup], fleet: Fleet, expected: ExpectedLengths, speed_of: SpeedOf
) -> WorkTable:
    """What these groups would take at each instance."""
    requests = np.array([group.requests for group in groups], dtype=np.float64)
    count = np.maximum(1.0, requests)
    sources: dict[_Source, int] = {}
    source = np.array(
        [sources.setdefault((g.model, g.kind, g.tenant), len(sources)) for g in groups],
        dtype=np.int64,
    )
    prompt = to_grids(np.array([group.prompt_tokens for group in groups]) / count)
    cap = to_grids(np.array([group.max_tokens for group in groups]) / count)
    first, kind = _distinct(source, prompt, cap)
    rows = _rows(source[first], prompt[first], cap[first], sources, expected)
    flows = _flows(rows, sources, fleet, speed_of)
    amount = count * _factors(groups, rows, kind, expected)
    largest = np.ceil(np.where(flows.served, flows.running, 1.0).max(axis=1, initial=1.0))
    last = fews(np.minimum(requests, largest[kind]))
    of_tail, tail_kind = _distinct(kind, last)
    tails = _tails(rows, flows, kind[of_tail], last[of_tail], sources, expected)
    each = np.where(flows.served, flows.request_s, np.inf)
    hosts = np.array([fleet.hosting(model) for model, _, _ in sources], dtype=np.bool_)
    served = hosts.reshape(len(sources), len(fleet.instances))[rows.source]
    excess = (rows.likely - rows.mean[:, None])[:, None, :] * flows.step_s[:, :, None]
    return WorkTable(
        kind,
        amount,
        np.where(served, each[:, fleet.classes] * fleet.slow, np.inf),
        np.where(served, flows.request_var[:, fleet.classes] * fleet.slow**2, np.inf),
        tail_kind,
        tails,
        np.where(flows.served[:, :, None], excess, np.inf),
        fleet.classes,
        fleet.slow,
    )


def _distinct(*columns: Ints) -> tuple[Ints, Ints]:
    """The first place of each distinct row of these columns, and which of these each row is."""
    key = columns[0]
    for column in columns[1:]:
        key = key * (int(column.max(initial=0)) + 1) + column
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    return first, inverse


def _rows(
    source: Ints, prompt: Ints, cap: Ints, sources: dict[_Source, int], expected: ExpectedLengths
) -> _Rows:
    limit, size = np.maximum(1.0, from_grids(cap)), source.size
    moments = np.empty(size), np.empty(size), np.empty((size, EXCESS))
    rows = _Rows(source, from_grids(prompt), limit, *moments)
    for key, n in sources.items():
        own = np.flatnonzero(source == n)
        lengths = expected.of(*key)
        rows.mean[own], rows.var[own] = lengths.capped_moments(limit[own])
        rows.likely[own] = np.minimum(lengths.equally_likely, limit[own, None])
    return rows


def _flows(rows: _Rows, sources: dict[_Source, int], fleet: Fleet, speed_of: SpeedOf) -> _Flows:
    shape = (rows.source.size, len(fleet.members))
    flows = _Flows(np.zeros(shape, dtype=np.bool_), *(np.ones(shape) for _ in range(4)))
    alike: dict[tuple[str, EngineKind], list[int]] = {}
    for (model, kind, _), n in sources.items():
        alike.setdefault((model, kind), []).append(n)
    for (model, kind), members in alike.items():
        own = np.flatnonzero(np.isin(rows.source, members))
        mean, var, prompt = rows.mean[own], rows.var[own], rows.prompt[own]
        for servers in fleet.servers(model):
            at = int(servers[0])
            view, place = fleet.instances[at], fleet.class_of[at]
            speed = speed_of(fleet.roots[model], view.device)
            running, step_s = saturated(*speed, mean, var, prompt, view.slots, view.kv_tokens, kind)
            per_token = step_s / running
            flows.served[own, place] = True
            flows.running[own, place], flows.step_s[own, place] = running, step_s
            flows.request_s[own, place] = np.maximum(1.0, mean) * per_token
            flows.request_var[own, place] = var * per_token**2
    return flows


def _factors(
    groups: Sequence[RequestGroup], rows: _Rows, kind: Ints, expected: ExpectedLengths
) -> Floats:
    """How many usual requests of its shape one of each group's is, going by its prompts."""
    factors = np.ones(len(groups))
    told = [g for g, group in enumerate(groups) if group.prompts]
    if told:
        own = kind[told]
        most = rows.limit[own] / np.maximum(1.0, rows.mean[own])
        asked = [groups[g] for g in told]
        factors[told] = np.minimum(
            np.maximum(1.0, most),
            [expected.of_prompts(group.model, group.tenant, group.prompts) for group in asked],
        )
    return factors


def _tails(
    rows: _Rows,
    flows: _Flows,
    row: Ints,
    last: Ints,
    sources: dict[_Source, int],
    expected: ExpectedLengths,
) -> Floats:
    """How much later than its occupation the last of so many requests ends; see `Flow.tail_s`."""
    inside = np.minimum(np.maximum(1, last)[:, None], flows.running[row])
    counts, longest = fews(inside), np.empty(inside.shape)
    limits = np.repeat(rows.limit[row, None], inside.shape[1], axis=1)
    for key, n in sources.items():
        own = np.flatnonzero(rows.source[row] == n)
        found = expected.of(*key).largest_under(limits[own].ravel(), counts[own].ravel())
        longest[own] = found.reshape(own.size, inside.shape[1])
    tails = np.maximum(0.0, longest * flows.step_s[row] - inside * flows.request_s[row])
    return np.where(flows.served[row], tails, np.inf)
