"""Request groups: what the scheduler orders, formed afresh from the queued slices at every tick.

Runs that share model, kind, class, tenant, miss policy and deadline bucket form one sequence, in
order of deadline and arrival, which is cut into groups of whole slices.

A run is cut from its tail, because slices leave it at its head: pieces keep their place, and so
their keys, while the head is worked off. Near the head pieces have the wanted size; every
`PIECES_PER_SIZE` pieces further back it doubles, so a run of n slices makes O(log n) groups and a
million queued requests no more than a few hundred. Doubled pieces are aligned with each other, so
coming nearer splits one in two and moves no other.

Short pieces of neighbouring runs are put together. A group is named after the last run in it when
it was formed; names found in the saved queues are kept, so that arrivals join the last group that
has room instead of renaming it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qlm_batch.domain.buckets import PromptMix
from qlm_batch.domain.snapshot import GroupPart, RequestGroup, RunView, Snapshot
from qlm_batch.scheduling.loops import loops

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BATCHES_PER_GROUP = 4.0
"""δ: running batches in a group; the paper found 4 to cost nothing against smaller ones."""
DEADLINE_SHARE = 0.25
"""Largest share of the time left that one group's work may take."""
PIECES_PER_SIZE = 8
"""Fewest pieces of one size; four per instance, so that a long run can be spread over a fleet."""
MOST_PIECES_PER_SIZE = 1024
BUCKETS_PER_WINDOW = 16.0
MAX_GROUPS = 6144
"""Beyond this, groups are doubled in size until they fit, unless they differ in kind."""


@dataclass(frozen=True, slots=True)
class ModelCapacity:
    """A typical instance for a model: its running batch, and seconds of it a request takes.

    `instances` serve the model.
    """

    running_batch: float
    request_s: float
    instances: int = 1


def form_groups(
    snapshot: Snapshot, capacity: Mapping[str, ModelCapacity]
) -> tuple[RequestGroup, ...]:
    """Every queued slice in exactly one group, ordered by deadline and arrival.

    `capacity` is by model; a model without an entry is served nowhere, and its groups take the
    largest size. Sizes are powers of two of slices, at least one.
    """
    runs, bounds = _families([run for run in snapshot.runs if run.slices > 0])
    if not runs:
        return ()
    first = [runs[n] for n in bounds[:-1].tolist()]
    servers = [capacity.get(run.model) for run in first]
    limits = _limits([run.deadline - snapshot.now for run in first], servers)
    per_size = [
        min(MOST_PIECES_PER_SIZE, max(PIECES_PER_SIZE, 4 * server.instances if server else 0))
        for server in servers
    ]
    known = frozenset(entry.group_key for entry in snapshot.queues)
    queued = _Queued(runs, bounds, np.array(per_size, dtype=np.int64), known)
    largest, grow = int(queued.slices.max()), 1
    while True:
        formed = _formed(queued, limits * grow)
        if formed.first.size <= MAX_GROUPS or grow > largest:
            return _groups(queued, formed)
        grow *= 2


def _families(runs: Sequence[RunView]) -> tuple[list[RunView], Ints]:
    """Runs that may share groups beside each other, in order, and where each family begins."""
    kinds = [(run.model, run.kind, run.slo_class, run.tenant, run.on_miss) for run in runs]
    rank = {kind: n for n, kind in enumerate(sorted(set(kinds)))}
    family = np.array([rank[kind] for kind in kinds], dtype=np.int64)
    deadline = np.array([run.deadline for run in runs], dtype=np.float64)
    created = np.array([run.created_at for run in runs], dtype=np.float64)
    bucket = _deadline_buckets(created, deadline)
    run_id = np.array([run.run_id for run in runs], dtype=np.int64)
    generation = np.array([run.generation for run in runs], dtype=np.int64)
    order = np.lexsort((generation, run_id, created, deadline, bucket, family))
    begins = np.flatnonzero((np.diff(family[order]) != 0) | (np.diff(bucket[order]) != 0.0)) + 1
    bounds = np.concatenate(([0], begins, [len(runs)]))
    return [runs[n] for n in order.tolist()], bounds


def _deadline_buckets(created: Floats, deadline: Floats) -> Floats:
    """The bucket each deadline falls in: its end, on a grid of about 1/16 of its window."""
    width = _power_of_two(np.maximum(1.0, deadline - created) / BUCKETS_PER_WINDOW)
    found: Floats = np.ceil(deadline / width) * width
    return found


def _power_of_two(values: Floats) -> Floats:
    """The largest power of two within each."""
    found: Floats = np.ldexp(1.0, np.frexp(values)[1] - 1)
    return found


def _limits(left_s: Sequence[float], servers: Sequence[ModelCapacity | None]) -> Floats:
    """Requests a group may hold: δ running batches, within a quarter of the time left.

    By family, whose first run is due after `left_s`.
    """
    limits = np.full(len(servers), np.inf)
    for n, (left, server) in enumerate(zip(left_s, servers, strict=True)):
        if server is not None:
            limits[n] = BATCHES_PER_GROUP * max(1.0, server.running_batch)
            if left > 0.0 and server.request_s > 0.0:
                limits[n] = min(limits[n], DEADLINE_SHARE * left / server.request_s)
    served = np.isfinite(limits)
    # Powers of two: sizes change seldom, and the cuts of one are cuts of the next smaller one.
    limits[served] = _power_of_two(np.maximum(1.0, limits[served]))
    return limits


class _Queued:
    """The queued runs, family by family, and their numbers as arrays.

    `known` are the names of groups formed before.
    """

    def __init__(
        self, runs: Sequence[RunView], bounds: Ints, per_size: Ints, known: frozenset[str]
    ) -> None:
        self.runs, self.bounds, self.per_size, self.known = runs, bounds, per_size, known
        self.family = np.repeat(np.arange(per_size.size), np.diff(bounds))
        self.slices = np.array([run.slices for run in runs], dtype=np.int64)
        self.requests = np.array([run.requests for run in runs], dtype=np.int64)
        self.prompt_tokens = np.array([run.prompt_tokens for run in runs], dtype=np.int64)
        self.max_tokens = np.array([run.max_tokens for run in runs], dtype=np.int64)

    def label(self, run: int, behind: int) -> str:
        """The name of the piece with so many slices behind it; it keeps while any are left."""
        own = self.runs[run]
        return f"{own.run_id}.{own.generation}.{behind}"


@dataclass(frozen=True, slots=True, eq=False)
class _Formed:
    """Pieces of runs, and groups of consecutive pieces by their first; `name` is a piece of each.

    Of each piece its run, the slices `behind` it in its run, and what of the run is in it.
    """

    run: Ints
    behind: Ints
    slices: Ints
    requests: Ints
    prompt_tokens: Ints
    max_tokens: Ints
    first: Ints
    name: Ints


def _formed(queued: _Queued, limits: Floats) -> _Formed:
    cut, packed = loops().cut, loops().packed
    run, behind = cut(
        queued.slices, queued.requests, limits[queued.family], queued.per_size[queued.family]
    )
    whole = queued.slices[run]
    # Within a run each piece begins where the one before it ends.
    front = np.where(np.diff(run, prepend=-1) != 0, whole, np.roll(behind, 1))
    start, end = whole - front, whole - behind
    requests, prompt_tokens, max_tokens = (
        _share(total[run], end, whole) - _share(total[run], start, whole)
        for total in (queued.requests, queued.prompt_tokens, queued.max_tokens)
    )
    known = np.zeros(run.size, dtype=np.bool_)
    if queued.known:
        labels = map(queued.label, run.tolist(), behind.tolist())
        known[:] = [label in queued.known for label in labels]
    bounds = np.searchsorted(run, queued.bounds)
    first, name = packed(requests, known, bounds, limits)
    return _Formed(run, behind, end - start, requests, prompt_tokens, max_tokens, first, name)


def _share(total: Ints, part: Ints, whole: Ints) -> Ints:
    """`total * part // whole`, where that product may exceed an integer of the machine."""
    found: Ints = total // whole * part + total % whole * part // whole
    return found


def _groups(queued: _Queued, formed: _Formed) -> tuple[RequestGroup, ...]:
    """The groups, ordered by deadline and arrival."""
    runs, first = queued.runs, formed.first
    # What a group has of one run is one part, however many pieces it is.
    apart = np.diff(formed.run, prepend=-1) != 0
    apart[first] = True
    begins = np.flatnonzero(apart)
    members = [runs[n] for n in formed.run[begins].tolist()]
    made = list(
        map(
            GroupPart,
            [run.run_id for run in members],
            [run.generation for run in members],
            np.add.reduceat(formed.slices, begins).tolist(),
        )
    )
    heads = np.searchsorted(begins, first)
    # Runs of a family are in order of deadline.
    deadline = np.array([members[n].deadline for n in heads.tolist()])
    arrivals = np.minimum.reduceat(np.array([run.created_at for run in members]), heads)
    # Stable, so that a run's groups stay in order from its head to its tail.
    order = np.lexsort((arrivals, deadline))
    starts, stops = heads[order].tolist(), np.append(heads[1:], begins.size)[order].tolist()
    requests, prompt_tokens, max_tokens = (
        np.add.reduceat(amount, first)[order].tolist()
        for amount in (formed.requests, formed.prompt_tokens, formed.max_tokens)
    )
    name = formed.name[order]
    keys = map(queued.label, formed.run[name].tolist(), formed.behind[name].tolist())
    head = [members[n] for n in starts]
    batches: list[tuple[str, ...]] = [(run.batch_id,) for run in head]
    prompts = [run.prompts for run in head]
    for g, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        if stop - start > 1:
            inside = members[start:stop]
            batches[g] = tuple(dict.fromkeys([run.batch_id for run in inside]))
            prompts[g] = _mixed(inside)
    return tuple(
        map(
            RequestGroup,
            keys,
            [run.model for run in head],
            [run.kind for run in head],
            [run.slo_class for run in head],
            [run.tenant for run in head],
            [run.deadline for run in head],
            arrivals[order].tolist(),
            [tuple(made[start:stop]) for start, stop in zip(starts, stops, strict=True)],
            batches,
            requests,
            prompt_tokens,
            max_tokens,
            [run.on_miss for run in head],
            prompts,
        )
    )


def _mixed(runs: Sequence[RunView]) -> PromptMix:
    """Prompts of the runs in a group; unknown where one of them is."""
    if not all(run.prompts for run in runs):
        return ()
    counts: dict[int, int] = {}
    for run in runs:
        for bucket, count in run.prompts:
            counts[bucket] = counts.get(bucket, 0) + count
    return tuple(sorted(counts.items()))
