"""Eviction: which running request gives its place to which waiting one, and how much batch runs.

Pure rules, called by the vLLM scheduler subclass and by the simulated engine alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

URGENT_BELOW: Final = 10**6
"""Engine priorities below are interactive; those of batch work are deadlines in Unix seconds."""

MAX_EVICTIONS: Final = 8
"""A request that gave way this often stays until it ends."""

RETRY_STEPS: Final = 8
"""Steps before room is made again for a request that got in nowhere after the last time."""

MOST_ALONE: Final = 3
"""Steps in a row that interactive prompts may have without batch work: a burst comes in several."""

TOGETHER: Final = 256
"""Prompt tokens that keep a processor busy: more in a step only makes it longer."""

QUIET_S: Final = 10.0
"""Without an interactive request for this long, batch work runs as if there were none."""

Favour = Literal["throughput", "balanced", "latency"]
"""What an engine favours where batch throughput and interactive latency are at odds."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How an engine shares its steps between interactive and batch work.

    `headroom`: places above those of batch work, kept for interactive requests.
    `alone`: an interactive prefill gets a step without batch work.
    `batch_prefill`: prompt tokens of batch work a step may hold, None for no bound of its own.
    `together`: prompt tokens up to which interactive requests enter in one step, None for all.
    """

    headroom: int
    alone: bool
    batch_prefill: int | None
    together: int | None = None


def pace(favour: str, slots: int, *, processor: bool = False) -> Pace:
    """The pace for `slots` places of batch work. ValueError for an unknown favour.

    On a `processor` a step of few tokens is short: the prompts of a burst go in one after another,
    which answers the first of them sooner and the last hardly later. On a GPU such a step takes
    most of a full one, since it reads the same weights: there, all go in at once, and batch work
    sits out only where latency is favoured.
    """
    together = TOGETHER if processor else None
    if favour == "throughput":
        return Pace(0, False, None)
    if favour == "balanced":
        return Pace(max(1, slots // 8), processor, 512, together)
    if favour == "latency":
        return Pace(max(2, slots // 4), True, 64, together)
    raise ValueError(f"'{favour}' is none of {', '.join(get_args(Favour))}.")


def is_urgent(priority: int) -> bool:
    """Whether an engine priority belongs to the interactive class."""
    return priority < URGENT_BELOW


def admission_limit(size: int, slots: int, urgent: int) -> int:
    """How many requests may run, so that at most `slots` of the `size` places hold batch work.

    `urgent` counts interactive requests, running and waiting. Holds where the waiting are admitted
    in the order of their priority.
    """
    return min(size, slots + urgent)


def entering(prompts: Iterable[int], together: int) -> int:
    """How many interactive requests enter in this step, of those waiting in their order.

    `prompts` are the tokens each has to compute. The first enters whatever it has, and those behind
    it while all fit in `together` tokens.
    """
    count = tokens = 0
    for prompt in prompts:
        tokens += prompt
        if count and tokens > together:
            break
        count += 1
    return count


@dataclass(frozen=True, slots=True)
class Waiting:
    """An interactive request that wants in, and the KV it needs (in any one unit)."""

    id: str
    kv: int


@dataclass(frozen=True, slots=True)
class Running:
    """A request inside: the KV free without it, and the KV it takes in the next step.

    One that rests has given its place away and kept its KV; it takes none.
    """

    id: str
    priority: int
    arrival: float
    kv: int
    grows: int
    rests: bool = False


@dataclass(frozen=True, slots=True)
class GivingWay:
    """Indices of those that give way: `rest` lose their place, `leave` their KV too."""

    rest: tuple[int, ...] = ()
    leave: tuple[int, ...] = ()


Rank = tuple[int, float]
"""A request's engine priority and arrival; the lowest rank runs first."""


def gives_way_first(running: Sequence[Rank]) -> list[int]:
    """Indices of the running requests in the order in which they give way: highest rank first.

    That is the latest deadline, of equals the last to arrive, of those the last in `running`.
    """
    return sorted(range(len(running)), key=lambda index: (running[index], index), reverse=True)


def victims(
    waiting: Sequence[Waiting],
    running: Sequence[Running],
    *,
    free_slots: int,
    free_kv: int,
    evictions: Mapping[str, int],
) -> GivingWay:
    """Who gives way so that the first of `waiting` fit.

    Who lacks a place only lets another rest: what keeps its KV goes on without computing anything
    twice. KV is taken from those that rest before it is taken from those that run; each time in
    the order of `gives_way_first`. `waiting` is in the order of admission; where room cannot be
    made for one of them, nobody gives way to it or those behind. `evictions` tells how often a
    request has given its place away before. Classes are compared, strictly: two of one class would
    take turns without end.
    """
    order = gives_way_first([(request.priority, request.arrival) for request in running])
    candidates = [
        index
        for index in order
        if not (running[index].rests or is_urgent(running[index].priority))
        and evictions.get(running[index].id, 0) < MAX_EVICTIONS
    ]
    resting = [index for index in order if running[index].rests]
    free_kv -= sum(request.grows for request in running)
    chosen = GivingWay()
    for request in waiting:
        rest, leave = [*chosen.rest], [*chosen.leave]
        while free_slots < 1 or free_kv < request.kv:
            if free_kv < request.kv and resting:
                leave.append(resting.pop(0))
                free_kv += running[leave[-1]].kv
            elif candidates:
                rest.append(candidates.pop(0))
                free_slots += 1
                free_kv += running[rest[-1]].grows
                resting = [index for index in order if index in resting or index == rest[-1]]
            else:
                return chosen
        free_slots -= 1
        free_kv -= request.kv
        chosen = GivingWay(tuple(rest), tuple(leave))
    return chosen
