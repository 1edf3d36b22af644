"""The engine model over arrays: `advance` runs many iterations and is compiled by numba.

Written in the subset that compiles; `engine.ReferenceEngine` says what it does. Requests are rows
of `ints` and `floats`; `order` holds the running rows, and behind them those that rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

P = ParamSpec("P")
R = TypeVar("R")


def jit(function: Callable[P, R]) -> Callable[P, R]:
    """Compile at the first call and keep the code on disk."""
    return cast("Callable[P, R]", numba.njit(cache=True)(function))


Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

STATE, KEY, PROMPT, OUTPUT, PRIORITY, NUMBER, GENERATED, COMPUTED, BLOCKS, SCHEDULED = range(10)
EVICTIONS, RESTS_AS, LEAVES_AS, CACHED, SAFE_UNTIL = 10, 11, 12, 13, 14
ROW = 15
FREE, WAITING, INSIDE = 0, 1, 2
ARRIVAL, FIRST, END = 0, 1, 2

RUNS, WAITS, FREE_BLOCKS, STEPS, TOKENS, PREEMPTIONS, RECOMPUTED, ROWS, SAMPLED = range(9)
ALONE_STEPS, HANDED_OUT, RESTS = 9, 10, 11
TOTALS = 12
SLOTS, BATCHED, BLOCK, URGENT_BELOW, SIZE, ALONE, MAX_EVICTIONS, MOST_ALONE = range(8)
PREFIX_CACHING, TOGETHER = 8, 9
CLOCK, BUSY = 0, 1
SAMPLES = 32


@jit
def _blocks(tokens: int, block: int) -> int:
    return (tokens + block - 1) // block


@jit
def _head(ints: Ints, floats: Floats, rows: int, after: int) -> int:
    """The waiting row of lowest (priority, arrival, number) behind `after`; -1 without any.

    `after` is a row, or -1 for the very first.
    """
    best = -1
    for row in range(rows):
        if ints[row, STATE] != WAITING:
            continue
        rank = (ints[row, PRIORITY], floats[row, ARRIVAL], ints[row, NUMBER])
        if after >= 0 and rank <= (
            ints[after, PRIORITY],
            floats[after, ARRIVAL],
            ints[after, NUMBER],
        ):
            continue
        if best < 0 or rank < (ints[best, PRIORITY], floats[best, ARRIVAL], ints[best, NUMBER]):
            best = row
    return best


@jit
def _victim(ints: Ints, floats: Floats, order: Ints, runs: int) -> int:
    """The position of the running row that gives way first, as in `eviction.gives_way_first`."""
    best = 0
    for at in range(1, runs):
        row, worst = order[at], order[best]
        if (ints[row, PRIORITY], floats[row, ARRIVAL]) >= (
            ints[worst, PRIORITY],
            floats[worst, ARRIVAL],
        ):
            best = at
    return best


@jit
def _candidate(ints: Ints, floats: Floats, order: Ints, runs: int, limits: Ints) -> int:
    """The position of the next row of batch work that may be evicted; -1 without any."""
    best = -1
    for at in range(runs):
        row = order[at]
        if (
            ints[row, PRIORITY] < limits[URGENT_BELOW]
            or ints[row, EVICTIONS] >= limits[MAX_EVICTIONS]
            or ints[row, RESTS_AS] > 0
        ):
            continue
        if best < 0 or (ints[row, PRIORITY], floats[row, ARRIVAL]) >= (
            ints[order[best], PRIORITY],
            floats[order[best], ARRIVAL],
        ):
            best = at
    return best


@jit
def _growth(ints: Ints, limits: Ints, row: int) -> int:
    """Blocks a running row takes in the next step."""
    left = ints[row, PROMPT] + ints[row, GENERATED] - ints[row, COMPUTED]
    tokens = min(left, limits[BATCHED])
    grown: int = _blocks(ints[row, COMPUTED] + tokens, limits[BLOCK]) - ints[row, BLOCKS]
    return max(0, grown)


@jit
def _hand_out(ints: Ints, totals: Ints, row: int, need: int) -> None:
    """Give a row the blocks it lacks of `need`."""
    grown = max(0, need - ints[row, BLOCKS])
    ints[row, BLOCKS] += grown
    totals[FREE_BLOCKS] -= grown
    totals[HANDED_OUT] += grown


@jit
def _find_cached(ints: Ints, totals: Ints, limits: Ints, row: int) -> None:
    """Give an admitted row what the prefix cache still has of it."""
    cached = ints[row, CACHED]
    if cached > 0 and limits[PREFIX_CACHING] > 0:
        reused = max(0, totals[HANDED_OUT] - ints[row, SAFE_UNTIL])
        whole = cached // limits[BLOCK]
        left = min(whole, max(0, _blocks(cached, limits[BLOCK]) - reused))
        ints[row, COMPUTED] = left * limits[BLOCK]
    totals[RECOMPUTED] += cached - ints[row, COMPUTED]
    ints[row, CACHED] = 0


@jit
def _leave(ints: Ints, order: Ints, totals: Ints, at: int) -> int:
    """Move the row inside at this position back to the waiting; the row."""
    row = order[at]
    for i in range(at, totals[RUNS] + totals[RESTS] - 1):
        order[i] = order[i + 1]
    totals[RUNS if at < totals[RUNS] else RESTS] -= 1
    totals[WAITS] += 1
    ints[row, CACHED] = ints[row, COMPUTED]
    ints[row, SAFE_UNTIL] = totals[HANDED_OUT] + totals[FREE_BLOCKS]
    totals[FREE_BLOCKS] += ints[row, BLOCKS]
    ints[row, COMPUTED] = 0
    ints[row, BLOCKS] = 0
    ints[row, STATE] = WAITING
    return int(row)


@jit
def _preempt(ints: Ints, order: Ints, totals: Ints, at: int) -> int:
    """Move the running row at this position back to the waiting; the row."""
    totals[PREEMPTIONS] += 1
    return int(_leave(ints, order, totals, at))


@jit
def _rest(ints: Ints, order: Ints, totals: Ints, at: int) -> None:
    """Take its place from the running row at this position."""
    row, last = order[at], totals[RUNS] + totals[RESTS] - 1
    for i in range(at, last):
        order[i] = order[i + 1]
    order[last] = row
    totals[RUNS] -= 1
    totals[RESTS] += 1
    totals[PREEMPTIONS] += 1
    ints[row, EVICTIONS] += 1


@jit
def _first_to_leave(ints: Ints, floats: Floats, order: Ints, totals: Ints) -> int:
    """The position of the row that gives its blocks away first: it rests or is about to.

    -1 without any.
    """
    best = -1
    for at in range(totals[RUNS] + totals[RESTS]):
        row = order[at]
        if at < totals[RUNS] and ints[row, RESTS_AS] == 0:
            continue
        if ints[row, LEAVES_AS] > 0:
            continue
        if best < 0 or (ints[row, PRIORITY], floats[row, ARRIVAL]) >= (
            ints[order[best], PRIORITY],
            floats[order[best], ARRIVAL],
        ):
            best = at
    return best


@jit
def _urgent_waiting(ints: Ints, totals: Ints, limits: Ints) -> int:
    """How many interactive rows wait."""
    urgent = 0
    if totals[WAITS] > 0:
        for row in range(totals[ROWS]):
            urgent += ints[row, STATE] == WAITING and ints[row, PRIORITY] < limits[URGENT_BELOW]
    return urgent


@jit
def _entering(ints: Ints, floats: Floats, totals: Ints, limits: Ints, waiting: int) -> int:
    """How many of the interactive rows that wait enter in this step, as `eviction.entering`."""
    if limits[TOGETHER] < 0:
        return waiting
    count, tokens, head = 0, 0, -1
    while count < waiting:
        head = _head(ints, floats, totals[ROWS], head)
        tokens += ints[head, PROMPT] + ints[head, GENERATED]
        if count > 0 and tokens > limits[TOGETHER]:
            break
        count += 1
    return count


@jit
def _evict(
    ints: Ints, floats: Floats, order: Ints, totals: Ints, limits: Ints, urgent: int
) -> None:
    """Make room for the first `urgent` rows that wait, as `eviction.victims` does."""
    if urgent == 0:
        return
    head = _head(ints, floats, totals[ROWS], -1)
    free_slots = limits[SIZE] - totals[RUNS]
    free = totals[FREE_BLOCKS]
    for at in range(totals[RUNS] + totals[RESTS]):
        ints[order[at], RESTS_AS] = 0
        ints[order[at], LEAVES_AS] = 0
        if at < totals[RUNS]:
            free -= _growth(ints, limits, order[at])
    resting = leaving = 0
    for number in range(urgent):
        if number > 0:
            head = _head(ints, floats, totals[ROWS], head)
        need = _blocks(ints[head, PROMPT] + ints[head, GENERATED], limits[BLOCK])
        rested, left, stuck = resting, leaving, False
        while free_slots < 1 or free < need:
            at = _first_to_leave(ints, floats, order, totals) if free < need else -1
            if at >= 0:
                leaving += 1
                ints[order[at], LEAVES_AS] = leaving
                free += ints[order[at], BLOCKS]
                continue
            at = _candidate(ints, floats, order, totals[RUNS], limits)
            if at < 0:
                stuck = True
                break
            resting += 1
            ints[order[at], RESTS_AS] = resting
            free_slots += 1
            free += _growth(ints, limits, order[at])
        if stuck:
            # Nobody gives way in vain.
            resting, leaving = rested, left
            break
        free_slots -= 1
        free -= need
    for turn in range(1, resting + 1):
        for at in range(totals[RUNS]):
            if ints[order[at], RESTS_AS] == turn:
                _rest(ints, order, totals, at)
                break
    for turn in range(1, leaving + 1):
        for at in range(totals[RUNS], totals[RUNS] + totals[RESTS]):
            if ints[order[at], LEAVES_AS] == turn:
                _leave(ints, order, totals, at)
                break


@jit
def _most_running(
    ints: Ints, order: Ints, totals: Ints, limits: Ints, urgent: int, alone: bool
) -> int:
    """How many may run after this step's admissions, as `eviction.admission_limit` has it."""
    inside = 0
    for at in range(totals[RUNS]):
        inside += ints[order[at], PRIORITY] < limits[URGENT_BELOW]
    held = totals[RUNS] - inside if alone else 0
    slots = 0 if alone else limits[SLOTS]
    limit = min(limits[SIZE] - held, slots + inside + urgent)
    return int(max(limit + held, totals[RUNS]))


@jit
def _run_again(
    ints: Ints, floats: Floats, order: Ints, totals: Ints, limits: Ints, urgent: int
) -> None:
    """Let rows that rest run where places are left for the urgent, the first in rank first."""
    while totals[RESTS] > 0:
        runs = totals[RUNS]
        if runs + urgent >= _most_running(ints, order, totals, limits, urgent, False):
            break
        first = runs
        for at in range(runs + 1, runs + totals[RESTS]):
            row, best = order[at], order[first]
            if (ints[row, PRIORITY], floats[row, ARRIVAL]) < (
                ints[best, PRIORITY],
                floats[best, ARRIVAL],
            ):
                first = at
        row = order[first]
        for i in range(first, runs, -1):
            order[i] = order[i - 1]
        order[runs] = row
        totals[RUNS] += 1
        totals[RESTS] -= 1


@jit
def _let_grow(ints: Ints, floats: Floats, order: Ints, totals: Ints, limits: Ints) -> None:
    """Take from rows that rest the blocks that running rows need in this step."""
    if totals[RESTS] == 0:
        return
    wanted = 0
    for at in range(totals[RUNS]):
        wanted += _growth(ints, limits, order[at])
    for at in range(totals[RUNS] + totals[RESTS]):
        ints[order[at], RESTS_AS] = 0
        ints[order[at], LEAVES_AS] = 0
    while totals[RESTS] > 0 and wanted > totals[FREE_BLOCKS]:
        _leave(ints, order, totals, _first_to_leave(ints, floats, order, totals))


@jit
def _alone(
    ints: Ints, floats: Floats, order: Ints, totals: Ints, limits: Ints, urgent: int
) -> bool:
    """Whether interactive rows have this step without batch work; so many in a row at most."""
    alone = (
        urgent > 0
        and limits[ALONE] > 0
        and totals[ALONE_STEPS] < limits[MOST_ALONE]
        and totals[RUNS] < limits[SIZE]
    )
    if alone:
        head = _head(ints, floats, totals[ROWS], -1)
        needed = _blocks(ints[head, PROMPT] + ints[head, GENERATED], limits[BLOCK])
        for at in range(totals[RUNS]):
            if ints[order[at], PRIORITY] < limits[URGENT_BELOW]:
                needed += _growth(ints, limits, order[at])
        alone = needed <= totals[FREE_BLOCKS]
    totals[ALONE_STEPS] = totals[ALONE_STEPS] + 1 if alone else 0
    return alone


@jit
def _schedule_running(
    ints: Ints, floats: Floats, order: Ints, totals: Ints, limits: Ints, alone: bool
) -> tuple[int, bool]:
    """Give running rows their tokens of this step; the budget left, and whether any lost out.

    With `alone` only interactive rows get any.
    """
    budget, before, at = limits[BATCHED], totals[PREEMPTIONS], 0
    while at < totals[RUNS] and budget > 0:
        row = order[at]
        if alone and ints[row, PRIORITY] >= limits[URGENT_BELOW]:
            at += 1
            continue
        tokens = min(ints[row, PROMPT] + ints[row, GENERATED] - ints[row, COMPUTED], budget)
        need = ints[row, BLOCKS]
        if ints[row, COMPUTED] + tokens > need * limits[BLOCK]:
            need = _blocks(ints[row, COMPUTED] + tokens, limits[BLOCK])
        lost = False
        while need - ints[row, BLOCKS] > totals[FREE_BLOCKS]:
            last = _victim(ints, floats, order, totals[RUNS])
            gone = _preempt(ints, order, totals, last)
            budget += ints[gone, SCHEDULED]
            ints[gone, SCHEDULED] = 0
            if gone == row:
                lost = True
                break
            if last < at:
                at -= 1
        if lost:
            break
        _hand_out(ints, totals, row, need)
        ints[row, SCHEDULED] = tokens
        budget -= tokens
        at += 1
    return budget, totals[PREEMPTIONS] > before


@jit
def _admit(
    ints: Ints, floats: Floats, order: Ints, totals: Ints, limits: Ints, most: int, budget: int
) -> None:
    """Admit waiting rows in their order while fewer than `most` run."""
    while totals[WAITS] > 0 and totals[RUNS] < most and budget > 0:
        head = _head(ints, floats, totals[ROWS], -1)
        known = ints[head, PROMPT] + ints[head, GENERATED]
        need = _blocks(known, limits[BLOCK])
        if need > totals[FREE_BLOCKS]:
            break
        ints[head, STATE] = INSIDE
        _find_cached(ints, totals, limits, head)
        _hand_out(ints, totals, head, need)
        ints[head, SCHEDULED] = min(known - ints[head, COMPUTED], budget)
        budget -= ints[head, SCHEDULED]
        for i in range(totals[RUNS] + totals[RESTS], totals[RUNS], -1):
            order[i] = order[i - 1]
        order[totals[RUNS]] = head
        totals[RUNS] += 1
        totals[WAITS] -= 1


@jit
def _sample(
    samples: Floats, totals: Ints, count: int, context: int, prefill: int, seconds: float
) -> None:
    at = totals[SAMPLED] % len(samples)
    totals[SAMPLED] += 1
    samples[at, 0], samples[at, 1], samples[at, 2] = count, context, prefill
    samples[at, 3] = seconds


@jit
def _finish(
    ints: Ints,
    floats: Floats,
    order: Ints,
    totals: Ints,
    times: Floats,
    speed: Floats,
    samples: Floats,
    done: Ints,
    ended: int,
) -> int:
    """End the step: time passes, tokens come, complete rows leave; how many ended so far."""
    count, context, prefill = 0, 0, 0
    for at in range(totals[RUNS]):
        row = order[at]
        tokens = ints[row, SCHEDULED]
        if tokens > 0:
            left = ints[row, PROMPT] + ints[row, GENERATED] - ints[row, COMPUTED]
            count += 1
            context += ints[row, COMPUTED]
            if ints[row, GENERATED] == 0 or left > 1:
                prefill += tokens
    seconds = speed[0] + speed[1] * count + speed[2] * context + speed[3] * prefill
    times[CLOCK] += seconds
    times[BUSY] += seconds
    _sample(samples, totals, count, context, prefill, seconds)
    totals[STEPS] += 1
    kept = 0
    for at in range(totals[RUNS]):
        row = order[at]
        ints[row, COMPUTED] += ints[row, SCHEDULED]
        ints[row, SCHEDULED] = 0
        if ints[row, COMPUTED] == ints[row, PROMPT] + ints[row, GENERATED]:
            ints[row, GENERATED] += 1
            totals[TOKENS] += 1
            if floats[row, FIRST] < 0.0:
                floats[row, FIRST] = times[CLOCK]
            if ints[row, GENERATED] == ints[row, OUTPUT]:
                floats[row, END] = times[CLOCK]
                ints[row, STATE] = FREE
                totals[FREE_BLOCKS] += ints[row, BLOCKS]
                ints[row, BLOCKS] = 0
                done[ended] = row
                ended += 1
                continue
        order[kept] = row
        kept += 1
    for at in range(totals[RESTS]):
        order[kept + at] = order[totals[RUNS] + at]
    totals[RUNS] = kept
    return ended


@jit
def _still(
    ints: Ints,
    order: Ints,
    totals: Ints,
    times: Floats,
    limits: Ints,
    speed: Floats,
    samples: Floats,
    until: float,
) -> bool:
    """Run, at once, the steps in which every running row decodes and none ends or needs room.

    Closed form: step j of n rows lasts base + b·n + c·(context + n·j). False where there are none.
    """
    runs = totals[RUNS]
    if runs == 0 or runs > limits[BATCHED]:
        return False
    steps, context = 1 << 40, 0
    for at in range(runs):
        row = order[at]
        if ints[row, PROMPT] + ints[row, GENERATED] - ints[row, COMPUTED] != 1:
            return False
        if ints[row, GENERATED] == 0:
            return False
        # The step that ends a row is run by itself.
        steps = min(steps, ints[row, OUTPUT] - ints[row, GENERATED] - 1)
        context += ints[row, COMPUTED]
    while steps > 0 and runs * _blocks(steps, limits[BLOCK]) > totals[FREE_BLOCKS]:
        steps //= 2
    if steps < 2:
        return False
    first = speed[0] + speed[1] * runs + speed[2] * context
    grow = speed[2] * runs
    left = until - times[CLOCK]
    if steps * first + grow * steps * (steps - 1) / 2 >= left:
        # Those that begin before `until`: the sum is increasing, so bisect.
        low, high = 1, steps
        while low < high:
            middle = (low + high + 1) // 2
            if (middle - 1) * first + grow * (middle - 1) * (middle - 2) / 2 < left:
                low = middle
            else:
                high = middle - 1
        steps = low
    seconds = steps * first + grow * steps * (steps - 1) / 2
    _sample(samples, totals, runs, context, 0, first)
    times[CLOCK] += seconds
    times[BUSY] += seconds
    totals[STEPS] += steps
    totals[TOKENS] += steps * runs
    for at in range(runs):
        row = order[at]
        ints[row, COMPUTED] += steps
        ints[row, GENERATED] += steps
        _hand_out(ints, totals, row, _blocks(ints[row, COMPUTED], limits[BLOCK]))
    return True


@jit
def advance(
    ints: Ints,
    floats: Floats,
    order: Ints,
    totals: Ints,
    times: Floats,
    limits: Ints,
    speed: Floats,
    samples: Floats,
    done: Ints,
    until: float,
) -> int:
    """Run every step that begins before `until`; `done[:returned]` are the rows that ended."""
    ended = 0
    while times[CLOCK] < until:
        if totals[RUNS] + totals[RESTS] + totals[WAITS] == 0:
            times[CLOCK] = until
            break
        waiting = _urgent_waiting(ints, totals, limits)
        urgent = _entering(ints, floats, totals, limits, waiting)
        _evict(ints, floats, order, totals, limits, urgent)
        _run_again(ints, floats, order, totals, limits, waiting)
        _let_grow(ints, floats, order, totals, limits)
        alone = _alone(ints, floats, order, totals, limits, urgent)
        most = _most_running(ints, order, totals, limits, urgent, alone)
        if urgent < waiting:
            most = min(most, totals[RUNS] + urgent)
        shut = totals[WAITS] == 0 or totals[RUNS] >= most
        if not shut:
            head = _head(ints, floats, totals[ROWS], -1)
            need = _blocks(ints[head, PROMPT] + ints[head, GENERATED], limits[BLOCK])
            shut = need > totals[FREE_BLOCKS]
        if shut and not alone and _still(ints, order, totals, times, limits, speed, samples, until):
            continue
        budget, preempted = _schedule_running(ints, floats, order, totals, limits, alone)
        if not preempted:
            _admit(ints, floats, order, totals, limits, most, budget)
        ended = _finish(ints, floats, order, totals, times, speed, samples, done, ended)
    return ended
