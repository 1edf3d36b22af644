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

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise
from operator import itemgetter
from typing import NamedTuple

from qlm_batch.domain.buckets import PromptMix
from qlm_batch.domain.jobs import EngineKind, OnMiss, SloClass
from qlm_batch.domain.snapshot import GroupPart, RequestGroup, RunView, Snapshot

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


class _Piece(NamedTuple):
    """The slices of one run in front of `behind` others; `label` keeps while any are left."""

    run: RunView
    label: str
    slices: int
    requests: int
    prompt_tokens: int
    max_tokens: int


_Key = tuple[str, EngineKind, SloClass, str, OnMiss, float]
_Entry = tuple[_Key, float, float, int, int, RunView]


class _Formed(NamedTuple):
    """What was made of the runs of one key, and of what: it holds while that is the same."""

    runs: tuple[RunView, ...]
    per_size: int
    names: frozenset[str]
    groups: tuple[RequestGroup, ...]


class Grouper:
    """Forms groups pass by pass and takes over what did not change, which only spares work."""

    def __init__(self) -> None:
        self._formed: dict[tuple[_Key, float], _Formed] = {}
        self._known: frozenset[str] = frozenset()

    def form(
        self, snapshot: Snapshot, capacity: Mapping[str, ModelCapacity]
    ) -> tuple[RequestGroup, ...]:
        """See `form_groups`."""
        # A run's id and generation tell entries apart before the run itself would be compared.
        runs = sorted([_entry(run) for run in snapshot.runs if run.slices > 0])
        families = [
            (key, tuple(entry[-1] for entry in members))
            for key, members in groupby(runs, key=itemgetter(0))
        ]
        known = frozenset(entry.group_key for entry in snapshot.queues)
        renamed = {_run_of(name) for name in known ^ self._known}
        before, self._formed, self._known = self._formed, {}, known
        largest, grow = max((entry[-1].slices for entry in runs), default=0), 1
        while True:
            groups: list[RequestGroup] = []
            for key, own in families:
                server = capacity.get(key[0])
                limit = _limit(own, snapshot.now, server) * grow
                spread = 4 * server.instances if server else 0
                per_size = min(MOST_PIECES_PER_SIZE, max(PIECES_PER_SIZE, spread))
                made = before.get((key, limit))
                stands = made and made.runs == own and made.per_size == per_size
                if not (made and stands and renamed.isdisjoint(made.names)):
                    made = _formed(own, limit, per_size, known)
                self._formed[key, limit] = made
                groups += made.groups
                if len(groups) > MAX_GROUPS and grow <= largest:
                    break
            else:
                break
            grow *= 2
        # Stable, so that a run's groups stay in order from its head to its tail.
        groups.sort(key=lambda group: (group.deadline, group.arrived_at))
        return tuple(groups)


def form_groups(
    snapshot: Snapshot, capacity: Mapping[str, ModelCapacity]
) -> tuple[RequestGroup, ...]:
    """Every queued slice in exactly one group, ordered by deadline and arrival.

    `capacity` is by model; a model without an entry is served nowhere, and its groups take the
    largest size. Sizes are powers of two of slices, at least one.
    """
    return Grouper().form(snapshot, capacity)


@lru_cache(maxsize=1 << 15)
def deadline_bucket(created_at: float, deadline: float) -> float:
    """The bucket a deadline falls in: its end, on a grid of about 1/16 of its window."""
    window_s = max(1.0, deadline - created_at)
    width = 2.0 ** math.floor(math.log2(window_s / BUCKETS_PER_WINDOW))
    return math.ceil(deadline / width) * width


def _entry(run: RunView) -> _Entry:
    bucket = deadline_bucket(run.created_at, run.deadline)
    key = (run.model, run.kind, run.slo_class, run.tenant, run.on_miss, bucket)
    return (key, run.deadline, run.created_at, run.run_id, run.generation, run)


def _run_of(name: str) -> str:
    """The part of a group's name that names its run."""
    return name.rpartition(".")[0]


def _formed(
    runs: tuple[RunView, ...], limit: float, per_size: int, known: frozenset[str]
) -> _Formed:
    pieces: list[_Piece] = []
    for run in runs:
        if run.slices == 1:
            pieces.append(_whole(run))
        else:
            pieces += _cut(run, limit, per_size)
    names = frozenset(f"{run.run_id}.{run.generation}" for run in runs)
    groups = tuple(_group(name, own) for name, own in _pack(pieces, limit, known))
    return _Formed(runs, per_size, names, groups)


def _limit(runs: Sequence[RunView], now: float, capacity: ModelCapacity | None) -> float:
    """Requests a group may hold: δ running batches, within a quarter of the time left."""
    if capacity is None:
        return math.inf
    wanted = BATCHES_PER_GROUP * max(1.0, capacity.running_batch)
    # The first is due first.
    left_s = runs[0].deadline - now
    if left_s > 0.0 and capacity.request_s > 0.0:
        wanted = min(wanted, DEADLINE_SHARE * left_s / capacity.request_s)
    # Powers of two: sizes change seldom, and the cuts of one are cuts of the next smaller one.
    return float(2.0 ** math.floor(math.log2(max(1.0, wanted))))


def _cut(run: RunView, limit: float, per_size: int) -> Iterator[_Piece]:
    """The run's pieces from head to tail."""
    per_slice = max(1.0, run.requests / run.slices)
    base = 1
    while base < run.slices and 2 * base * per_slice <= limit:
        base *= 2
    whole = run.slices
    if base >= whole:
        yield _whole(run)
        return
    position, size, made = whole, base, 0
    bounds = [whole]
    while position > 0:
        if made == per_size and position % (2 * size) == 0:
            size, made = 2 * size, 0
        made = min(per_size, made + 1)
        position = (math.ceil(position / size) - 1) * size
        bounds.append(position)
    for front, back in pairwise(bounds):
        start, end = whole - front, whole - back
        yield _Piece(
            run,
            _label(run, back),
            end - start,
            run.requests * end // whole - run.requests * start // whole,
            run.prompt_tokens * end // whole - run.prompt_tokens * start // whole,
            run.max_tokens * end // whole - run.max_tokens * start // whole,
        )


def _whole(run: RunView) -> _Piece:
    label = f"{run.run_id}.{run.generation}.0"
    return _Piece(run, label, run.slices, run.requests, run.prompt_tokens, run.max_tokens)


def _label(run: RunView, behind: int) -> str:
    return f"{run.run_id}.{run.generation}.{behind}"


def _pack(
    pieces: Sequence[_Piece], limit: float, known: frozenset[str]
) -> Iterable[tuple[str, list[_Piece]]]:
    """Named groups of consecutive pieces: up to each known name, then as many as fit."""
    if len(pieces) == 1:
        return [(pieces[0].label, [pieces[0]])]
    groups: list[tuple[str, list[_Piece]]] = []
    waiting: list[_Piece] = []
    for piece in pieces:
        waiting.append(piece)
        if piece.label in known:
            # Filled from the back, so that what returned to the queue's head splits off.
            backwards = list(_fill(waiting[::-1], limit))
            groups += [(part[0].label, part[::-1]) for part in reversed(backwards)]
            waiting = []
    if groups and waiting:
        name, last = groups[-1]
        first, *others = _fill([*last, *waiting], limit)
        if len(first) > len(last):
            groups[-1] = (name, first)
            groups += [(part[-1].label, part) for part in others]
            return groups
    groups += [(part[-1].label, part) for part in _fill(waiting, limit)]
    return groups


def _fill(pieces: Sequence[_Piece], limit: float) -> Iterator[list[_Piece]]:
    """Consecutive pieces, as many together as stay within `limit` requests, at least one."""
    part: list[_Piece] = []
    requests = 0
    for piece in pieces:
        if part and requests + piece.requests > limit:
            yield part
            part, requests = [], 0
        part.append(piece)
        requests += piece.requests
    if part:
        yield part


def _group(key: str, pieces: Sequence[_Piece]) -> RequestGroup:
    first = pieces[0].run
    if len(pieces) == 1:
        parts: tuple[GroupPart, ...] = (
            GroupPart(first.run_id, first.generation, pieces[0].slices),
        )
        batches: tuple[str, ...] = (first.batch_id,)
        deadline, arrived_at = first.deadline, first.created_at
        _, _, _, requests, prompt_tokens, max_tokens = pieces[0]
        prompts = first.prompts
    else:
        slices: dict[tuple[int, int], int] = {}
        for piece in pieces:
            run = (piece.run.run_id, piece.run.generation)
            slices[run] = slices.get(run, 0) + piece.slices
        parts = tuple(GroupPart(*run, n) for run, n in slices.items())
        batches = tuple(dict.fromkeys([piece.run.batch_id for piece in pieces]))
        deadline = min([piece.run.deadline for piece in pieces])
        arrived_at = min([piece.run.created_at for piece in pieces])
        requests = sum([piece.requests for piece in pieces])
        prompt_tokens = sum([piece.prompt_tokens for piece in pieces])
        max_tokens = sum([piece.max_tokens for piece in pieces])
        prompts = _mixed(pieces)
    return RequestGroup(
        key=key,
        model=first.model,
        kind=first.kind,
        slo_class=first.slo_class,
        tenant=first.tenant,
        deadline=deadline,
        arrived_at=arrived_at,
        parts=parts,
        batches=batches,
        requests=requests,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        on_miss=first.on_miss,
        prompts=prompts,
    )


def _mixed(pieces: Sequence[_Piece]) -> PromptMix:
    """Prompts of the runs in a group, each run once; unknown where one of them is."""
    runs = {id(piece.run): piece.run for piece in pieces}.values()
    if len(runs) == 1 or not all(run.prompts for run in runs):
        return pieces[0].run.prompts if len(runs) == 1 else ()
    counts: dict[int, int] = {}
    for run in runs:
        for bucket, count in run.prompts:
            counts[bucket] = counts.get(bucket, 0) + count
    return tuple(sorted(counts.items()))
