"""The hot loops of planning over flat arrays: in order, by insertion, and by ruin and recreate.

Written in the subset that compiles. Queues are rows of `place` (instance, position), filled up to
`size`. What a group takes at instance i is `mean[kind, i] · amount`; its tail, beyond that,
`tails[kind, i]`.
`setup[i, a, b]` is the time lost between work of models a and b, a = -1 standing for the start.

What is compiled is kept until its own file changes, so loops that call each other share this one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qlm_batch.scheduling.compiled import compiled, inlined

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

NOWHERE = -1
RUIN_QUEUES = 3
RUIN_GROUPS = 5
RECALLED = 4
"""Most groups let go that are tried again in one move."""
POSITIONS_PER_MOVE = 2048
"""Insertions tried in one move; a longer one is charged as several."""
_MOST_OUT = RUIN_QUEUES * RUIN_GROUPS + RECALLED
_MODULUS = 2147483647
_TRIES = 4


class Columns(NamedTuple):
    """A planning problem as arrays; see the module. `before` is -1 for a group without a place."""

    model: Ints
    due: Floats
    weight: Floats
    kind: Ints
    amount: Floats
    mean: Floats
    var: Floats
    tails: Floats
    before: Ints
    serves: Flags
    awake: Flags
    ready: Floats
    ready_var: Floats
    setup: Floats
    z: float
    inflation: float


@compiled
def _hosts(c: Columns) -> tuple[Ints, Ints]:
    """The instances that serve each model, ascending in its row, and how many these are."""
    m, models = c.serves.shape
    hosts, many = np.empty((models, m), dtype=np.int64), np.zeros(models, dtype=np.int64)
    for i in range(m):
        for k in range(models):
            if c.serves[i, k]:
                hosts[k, many[k]] = i
                many[k] += 1
    return hosts, many


@compiled
def in_order(c: Columns, order: Ints, shed: bool) -> Ints:
    """The instance of each group, or NOWHERE: taken in `order`, each where it is done soonest.

    With `shed`, what would be late everywhere goes nowhere.
    """
    owner = np.full(c.due.size, NOWHERE, dtype=np.int64)
    ends, variances = c.ready.copy(), c.ready_var.copy()
    hosts, many = _hosts(c)
    lost = c.setup[:, -1, :].T.copy()
    for g in order:
        k, kind, count = c.model[g], c.kind[g], c.amount[g]
        best, soonest = NOWHERE, math.inf
        for h in range(many[k]):
            i = hosts[k, h]
            after = ends[i] + lost[k, i] + c.mean[kind, i] * count
            if c.z >= 0.0 and (after + c.tails[kind, i]) * c.inflation >= soonest:
                continue
            var = variances[i] + c.var[kind, i] * count
            done = (after + c.tails[kind, i]) * c.inflation + c.z * math.sqrt(var)
            if done < soonest:
                best, soonest = i, done
        if best < 0 or (shed and soonest > c.due[g]):
            continue
        owner[g] = best
        ends[best] += lost[k, best] + c.mean[kind, best] * count
        variances[best] += c.var[kind, best] * count
        lost[:, best] = c.setup[best, k]
    return owner


@inlined
def walk(
    c: Columns, i: int, queue: Ints, size: int, ends: Floats, variances: Floats, slack: Floats
) -> float:
    """Fill in the times of a queue and what each position and all behind it may be delayed.

    Returns the seconds spent swapping. `slack` has one entry more than the queue: inf.
    """
    end, var, last, swap_s = c.ready[i], c.ready_var[i], -1, 0.0
    for p in range(size):
        g = queue[p]
        k = c.model[g]
        if k != last:
            lost = c.setup[i, last, k]
            swap_s += lost
            end += lost
            last = k
        end += c.mean[c.kind[g], i] * c.amount[g]
        var += c.var[c.kind[g], i] * c.amount[g]
        ends[p], variances[p] = end, var
    slack[size] = math.inf
    for p in range(size - 1, -1, -1):
        g = queue[p]
        done = (ends[p] + c.tails[c.kind[g], i]) * c.inflation + c.z * math.sqrt(variances[p])
        slack[p] = min(slack[p + 1], c.due[g] - done)
    return swap_s


@compiled
def walk_all(c: Columns, flat: Ints, bounds: Ints) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """Times along all queues, queue i being `flat[bounds[i] : bounds[i + 1]]`.

    For each group its start, the mean and variance of its occupation's end, and when it is done at
    the planning quantile; for each instance the seconds spent swapping.
    """
    starts, ends = np.empty(flat.size), np.empty(flat.size)
    variances, done = np.empty(flat.size), np.empty(flat.size)
    swap_s = np.zeros(bounds.size - 1)
    for i in range(bounds.size - 1):
        end, var, last = c.ready[i], c.ready_var[i], -1
        for p in range(bounds[i], bounds[i + 1]):
            g = flat[p]
            k = c.model[g]
            if k != last:
                lost = c.setup[i, last, k]
                swap_s[i] += lost
                end += lost
                last = k
            starts[p] = end
            end += c.mean[c.kind[g], i] * c.amount[g]
            var += c.var[c.kind[g], i] * c.amount[g]
            ends[p], variances[p] = end, var
            tail = c.tails[c.kind[g], i]
            done[p] = (end + tail) * c.inflation + c.z * math.sqrt(var)
    return starts, ends, variances, done, swap_s


@compiled
def tidied(c: Columns, rank: Ints, flat: Ints, bounds: Ints) -> Ints:
    """Queues, laid out as for `walk_all`, with each run of one model by rank.

    A queue in which that would make something late stays as it is.
    """
    tidy = flat.copy()
    longest = 0
    for i in range(bounds.size - 1):
        longest = max(longest, bounds[i + 1] - bounds[i])
    ends, variances, slack = np.empty(longest), np.empty(longest), np.empty(longest + 1)
    for i in range(bounds.size - 1):
        changed, start = False, bounds[i]
        for p in range(bounds[i] + 1, bounds[i + 1] + 1):
            if p < bounds[i + 1] and c.model[flat[p]] == c.model[flat[start]]:
                continue
            run = flat[start:p]
            order = np.argsort(rank[run])
            for n in range(order.size):
                changed = changed or order[n] != n
                tidy[start + n] = run[order[n]]
            start = p
        if changed:
            queue = tidy[bounds[i] : bounds[i + 1]]
            walk(c, i, queue, queue.size, ends, variances, slack)
            if slack[0] < 0.0:
                queue[:] = flat[bounds[i] : bounds[i + 1]]
    return tidy


@compiled
def behind(c: Columns, order: Ints, ends: Floats, last: Ints) -> Ints:
    """The instance of each group of `order` when all are put behind what ends at `ends`.

    Each goes where it would end soonest; `last` is the model of each queue's last group. `ends` are
    changed.
    """
    owner = np.full(order.size, NOWHERE, dtype=np.int64)
    hosts, many = _hosts(c)
    lost = np.empty((c.serves.shape[1], ends.size))
    for i in range(ends.size):
        lost[:, i] = c.setup[i, last[i]]
    for n in range(order.size):
        k, kind, amount = c.model[order[n]], c.kind[order[n]], c.amount[order[n]]
        soonest = math.inf
        for h in range(many[k]):
            i = hosts[k, h]
            end = ends[i] + lost[k, i] + c.mean[kind, i] * amount
            if end < soonest:
                soonest, owner[n] = end, i
        if owner[n] >= 0:
            ends[owner[n]] = soonest
            lost[:, owner[n]] = c.setup[owner[n], k]
    return owner


@compiled
def insert_one(c: Columns, place: Ints, size: Ints, g: int, swap_price: float) -> tuple[int, int]:
    """Where one more group fits all queues at the least cost: instance and position, or NOWHERE.

    `place` is not changed.
    """
    room = place.shape[1]
    ends, variances, slack = np.empty(room), np.empty(room), np.empty(room + 1)
    best, owner, at = math.inf, NOWHERE, 0
    for i in range(size.size):
        if not c.serves[i, c.model[g]]:
            continue
        walk(c, i, place[i], size[i], ends, variances, slack)
        cost, position = cheapest(c, i, place[i], size[i], ends, variances, slack, g, swap_price)
        if cost < math.inf:
            # Where it ends soonest; among equals where it adds least.
            cost += c.ready[i] if size[i] == 0 else ends[size[i] - 1]
            if cost < best:
                best, owner, at = cost, i, position
    return owner, at


@compiled
def insert_late(
    c: Columns,
    due: Floats,
    lines: Floats,
    excess: Floats,
    classes: Ints,
    slow: Floats,
    place: Ints,
    size: Ints,
    order: Ints,
    least: float,
    price: float,
    tries: int,
) -> Flags:
    """Put what cannot be on time as a whole where most of it is and nothing already placed suffers.

    Groups are taken in `order`, each at least `least` of it in time and worth more than `price` for
    each second of swapping it adds, until `tries` positions were looked at. `due` are true
    deadlines; those in `c` are moved to the end of what is placed late, which must not become later
    still. `lines` are the groups' requests; `excess`, `classes` and `slow` as in a WorkTable.
    `place` has room; it and `size` are changed. Returns which were placed.
    """
    m, room = place.shape
    ends, variances, slack = np.empty((m, room)), np.empty((m, room)), np.empty((m, room + 1))
    walked = np.zeros(m, dtype=np.bool_)
    placed = np.zeros(order.size, dtype=np.bool_)
    for n in range(order.size):
        g = order[n]
        k, kind = c.model[g], c.kind[g]
        best, owner, at, ended = 0.0, NOWHERE, 0, 0.0
        for i in range(size.size):
            if not c.serves[i, k]:
                continue
            mean, var = c.mean[kind, i] * c.amount[g], c.var[kind, i] * c.amount[g]
            push = c.z * math.sqrt(var)
            if not walked[i]:
                walk(c, i, place[i], size[i], ends[i], variances[i], slack[i])
                walked[i] = True
            end, end_var, last = c.ready[i], c.ready_var[i], -1
            for p in range(size[i] + 1):
                tries -= 1
                added = mean + c.setup[i, last, k]
                start = end + c.setup[i, last, k]
                if p < size[i]:
                    follow = c.model[place[i, p]]
                    added += c.setup[i, k, follow] - c.setup[i, last, follow]
                if start * c.inflation > due[g]:
                    break
                if added * c.inflation + push <= slack[i, p]:
                    share, span = 0.0, max(mean * c.inflation, 1e-9)
                    spread = c.z * math.sqrt(end_var + var)
                    begin = start * c.inflation + spread
                    for e in range(excess.shape[2]):
                        left = (due[g] - begin - excess[kind, classes[i], e] * slow[i]) / span
                        made = math.floor(lines[g] * min(1.0, max(0.0, left)))
                        share += made / (lines[g] * excess.shape[2])
                    gain = c.weight[g] * share - price * (added - mean)
                    if share >= least and gain > best:
                        done = (start + mean + c.tails[c.kind[g], i]) * c.inflation
                        ended = done + spread
                        best, owner, at = gain, i, p
                if p < size[i]:
                    end, end_var, last = ends[i, p], variances[i, p], c.model[place[i, p]]
        if owner >= 0:
            for p in range(size[owner], at, -1):
                place[owner, p] = place[owner, p - 1]
            place[owner, at] = g
            size[owner] += 1
            c.due[g] = max(c.due[g], ended)
            walked[owner], placed[n] = False, True
        if tries <= 0:
            break
    return placed


@compiled
def by_insertion(
    c: Columns, order: Ints, place: Ints, size: Ints, stay_s: float, swap_price: float
) -> Ints:
    """Fill queues in `order`, each group behind the last run of its model or at a queue's end.

    It goes where its queue then ends soonest, a swap counting more than its time, and only where
    nothing becomes late. Returns the instance of each group, or NOWHERE.
    """
    m, models = c.serves.shape
    owner = np.full(c.due.size, NOWHERE, dtype=np.int64)
    ends, variances = c.ready.copy(), c.ready_var.copy()
    hosts, many = _hosts(c)
    lost = c.setup[:, -1, :].T.copy()
    last = np.full(m, -1, dtype=np.int64)
    spot = np.zeros((models, m), dtype=np.int64)
    spot_end = np.full((models, m), math.inf)
    spot_var = np.zeros((models, m))
    spot_slack = np.full((models, m), math.inf)
    for i in range(m):
        for k in range(models):
            spot_var[k, i] = c.ready_var[i]
            if c.awake[i, k]:
                spot_end[k, i] = c.ready[i]
    room = place.shape[1]
    q_ends, q_vars, q_slack = np.empty(room + 1), np.empty(room + 1), np.empty(room + 2)
    for g in order:
        k, kind, count, due = c.model[g], c.kind[g], c.amount[g], c.due[g]
        best, cheapest, appended = NOWHERE, math.inf, False
        for h in range(many[k]):
            i = hosts[k, h]
            mean = c.mean[kind, i] * count
            stay = stay_s if i == c.before[g] else 0.0
            # No swap makes it less.
            if ends[i] + mean - stay >= cheapest:
                continue
            tail, var = c.tails[kind, i], c.var[kind, i] * count
            end = ends[i] + lost[k, i] + mean
            price = in_run = math.inf
            done = (end + tail) * c.inflation
            if c.z < 0.0 or done <= due:
                late = done + c.z * math.sqrt(variances[i] + var) - due
                if late <= 0.0:
                    price = end + swap_price * lost[k, i]
            done = (spot_end[k, i] + mean + tail) * c.inflation
            if c.z < 0.0 or done <= due:
                late = done + c.z * math.sqrt(spot_var[k, i] + var) - due
                push = mean * c.inflation + c.z * math.sqrt(var)
                if late <= 0.0 and push <= spot_slack[k, i]:
                    in_run = ends[i] + mean
            cost = min(price, in_run) - stay
            if cost < cheapest:
                best, cheapest, appended = i, cost, price <= in_run
        if best < 0:
            continue
        owner[g] = best
        i = best
        queue = place[i]
        if appended:
            first = last[i] < 0
            ends[i] += lost[k, i] + c.mean[kind, i] * count
            variances[i] += c.var[kind, i] * count
            done = (ends[i] + c.tails[kind, i]) * c.inflation
            done += c.z * math.sqrt(variances[i])
            for other in range(models):
                # A run at the end has nothing behind it yet, and so no bound; now it has one.
                spot_slack[other, i] = min(spot_slack[other, i], due - done)
                # A head spot stays only where using it would not make the first swap longer.
                longer = c.setup[i, other, k] - c.setup[i, -1, k] > 0.0
                if first and c.awake[i, other] and longer:
                    spot_end[other, i] = math.inf
            queue[size[i]] = g
            size[i] += 1
            last[i] = k
            lost[:, i] = c.setup[i, k]
            spot[k, i] = size[i]
            spot_end[k, i], spot_var[k, i] = ends[i], variances[i]
            spot_slack[k, i] = math.inf
            continue
        at = spot[k, i]
        for p in range(size[i], at, -1):
            queue[p] = queue[p - 1]
        queue[at] = g
        size[i] += 1
        walk(c, i, queue, size[i], q_ends, q_vars, q_slack)
        head = c.model[queue[0]]
        for other in range(models):
            if c.awake[i, other]:
                free = c.setup[i, other, head] <= c.setup[i, -1, head]
                spot[other, i] = 0
                spot_end[other, i] = c.ready[i] if free else math.inf
                spot_var[other, i] = c.ready_var[i]
                spot_slack[other, i] = q_slack[0]
        for p in range(size[i]):
            other = c.model[queue[p]]
            spot[other, i] = p + 1
            spot_end[other, i], spot_var[other, i] = q_ends[p], q_vars[p]
            spot_slack[other, i] = q_slack[p + 1]
        ends[i], variances[i] = q_ends[size[i] - 1], q_vars[size[i] - 1]
        last[i] = c.model[queue[size[i] - 1]]
        lost[:, i] = c.setup[i, last[i]]
    return owner


@inlined
def cheapest(
    c: Columns,
    i: int,
    queue: Ints,
    size: int,
    ends: Floats,
    variances: Floats,
    slack: Floats,
    g: int,
    swap_price: float,
) -> tuple[float, int]:
    """The least time a group adds to a walked queue, and where; inf where it fits nowhere.

    Of places that cost the same it takes the last one behind a group that is due no later, so that
    what was there first is not overtaken without need.
    """
    k, due = c.model[g], c.due[g]
    mean, var = c.mean[c.kind[g], i] * c.amount[g], c.var[c.kind[g], i] * c.amount[g]
    tail, push = c.tails[c.kind[g], i], c.z * math.sqrt(var)
    end, end_var, last = c.ready[i], c.ready_var[i], -1
    best, where, p = math.inf, -1, 0
    while p <= size and (end + mean) * c.inflation <= due:
        lead = c.setup[i, last, k]
        added = mean + lead
        if p < size:
            follow = c.model[queue[p]]
            added += c.setup[i, k, follow] - c.setup[i, last, follow]
        cost = added + swap_price * (added - mean)
        behind_earlier = cost == best and c.due[queue[p - 1]] <= due
        if (cost < best or behind_earlier) and added * c.inflation + push <= slack[p]:
            done = (end + lead + mean + tail) * c.inflation + c.z * math.sqrt(end_var + var)
            if done <= due:
                best, where = cost, p
        if p < size:
            end, end_var, last = ends[p], variances[p], c.model[queue[p]]
        p += 1
    return best, where


@inlined
def _below(state: Ints, bound: int) -> int:
    """The next pseudo-random number in [0, bound): Park and Miller's minimal generator."""
    state[0] = (state[0] * 48271) % _MODULUS
    return int(state[0] % bound)


@compiled
def _pick(c: Columns, busy: Ints, state: Ints, chosen: Ints) -> int:
    """Draw an instance and up to two that share a model with it; how many."""
    chosen[0] = busy[_below(state, busy.size)]
    picked = 1
    for _ in range(_below(state, RUIN_QUEUES)):
        for _try in range(_TRIES):
            i = busy[_below(state, busy.size)]
            known = False
            for j in range(picked):
                known = known or chosen[j] == i
            alike = False
            for k in range(c.serves.shape[1]):
                alike = alike or (c.serves[i, k] and c.serves[chosen[0], k])
            if alike and not known:
                chosen[picked] = i
                picked += 1
                break
    return picked


@compiled
def _shuffle(c: Columns, least: Floats, out: Ints, n: int, state: Ints) -> None:
    """Order groups by deadline, by weight per second, or at random."""
    how = _below(state, 3)
    if how == 2:
        for a in range(n - 1, 0, -1):
            b = _below(state, a + 1)
            out[a], out[b] = out[b], out[a]
        return
    for a in range(1, n):
        g, b = out[a], a
        key = c.due[g] if how == 0 else -c.weight[g] / least[g]
        while b > 0:
            other = out[b - 1]
            ahead = c.due[other] if how == 0 else -c.weight[other] / least[other]
            if ahead < key or (ahead == key and other < g):
                break
            out[b] = other
            b -= 1
        out[b] = g


@compiled
def search(
    c: Columns,
    least: Floats,
    place: Ints,
    size: Ints,
    let_go: Ints,
    gone: int,
    moves: int,
    seed: int,
    swap_price: float,
    density: float,
) -> int:
    """Improve queues in which all is on time, in place, by `moves` ruins and recreations.

    `let_go[:gone]` are the groups standing nowhere; returns how many are left. A move is kept when
    it is worth no less: weight placed, less `density` for each second of swapping it adds.
    """
    m, room = place.shape
    busy = np.flatnonzero(size >= 0)
    serving = 0
    for i in range(m):
        for k in range(c.serves.shape[1]):
            if c.serves[i, k]:
                busy[serving] = i
                serving += 1
                break
    busy = busy[:serving]
    state = np.array([seed % (_MODULUS - 1) + 1])
    chosen = np.zeros(RUIN_QUEUES, dtype=np.int64)
    queue = np.zeros((RUIN_QUEUES, room), dtype=np.int64)
    length = np.zeros(RUIN_QUEUES, dtype=np.int64)
    ends, variances = np.zeros((RUIN_QUEUES, room)), np.zeros((RUIN_QUEUES, room))
    slack, swaps = np.zeros((RUIN_QUEUES, room + 1)), np.zeros(RUIN_QUEUES)
    out, left = np.zeros(_MOST_OUT, dtype=np.int64), np.zeros(_MOST_OUT, dtype=np.int64)
    swap_s = np.zeros(m)
    for i in range(m):
        swap_s[i] = walk(c, i, place[i], size[i], ends[0], variances[0], slack[0])
    budget = float(moves)
    while budget > 0.0 and serving > 0 and (gone > 0 or swap_s.sum() > 0.0):
        tried = 0
        picked = _pick(c, busy, state, chosen)
        removed, before_s = 0, 0.0
        for q in range(picked):
            i = chosen[q]
            before_s += swap_s[i]
            take = start = 0
            if size[i] > 0:
                take = min(size[i], 1 + _below(state, RUIN_GROUPS))
                start = _below(state, size[i] - take + 1)
            length[q] = 0
            for p in range(size[i]):
                if start <= p < start + take:
                    out[removed] = place[i, p]
                    removed += 1
                else:
                    queue[q, length[q]] = place[i, p]
                    length[q] += 1
            swaps[q] = walk(c, i, queue[q], length[q], ends[q], variances[q], slack[q])
        gain = 0.0
        for r in range(removed):
            gain -= c.weight[out[r]]
        recalled = min(gone, RECALLED)
        for r in range(recalled):
            # Drawn ones go behind the rest of the list, where a kept move drops them.
            at, end = _below(state, gone - r), gone - 1 - r
            let_go[at], let_go[end] = let_go[end], let_go[at]
            out[removed + r] = let_go[end]
        _shuffle(c, least, out, removed + recalled, state)
        missing = 0
        for r in range(removed + recalled):
            g = out[r]
            best, where, at = math.inf, -1, 0
            for q in range(picked):
                if c.serves[chosen[q], c.model[g]] and length[q] < room:
                    tried += length[q] + 1
                    cost, position = cheapest(
                        c, chosen[q], queue[q], length[q], ends[q], variances[q], slack[q],
                        g, swap_price,
                    )  # fmt: skip
                    if cost < best:
                        best, where, at = cost, q, position
            if where < 0:
                left[missing] = g
                missing += 1
                continue
            gain += c.weight[g]
            for p in range(length[where], at, -1):
                queue[where, p] = queue[where, p - 1]
            queue[where, at] = g
            length[where] += 1
            swaps[where] = walk(
                c, chosen[where], queue[where], length[where],
                ends[where], variances[where], slack[where],
            )  # fmt: skip
        after_s = 0.0
        for q in range(picked):
            after_s += swaps[q]
        budget -= max(1.0, tried / POSITIONS_PER_MOVE)
        if gain - density * (after_s - before_s) < 0.0:
            continue
        for q in range(picked):
            i = chosen[q]
            size[i], swap_s[i] = length[q], swaps[q]
            for p in range(length[q]):
                place[i, p] = queue[q, p]
        gone -= recalled
        for r in range(missing):
            let_go[gone] = left[r]
            gone += 1
    return gone
