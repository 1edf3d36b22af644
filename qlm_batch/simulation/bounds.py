"""What no policy can beat: work in machine seconds, and linear programs over time.

A step of an engine takes base + b·sequences + c·context + p·prefill. Its base is shared by at most
`slots` sequences, and by no more than key-value memory holds; so a token of a sequence holding k of
K tokens is charged θ/slots + (1 − θ)·k/K of it. For any θ in [0, 1] the charges of one step sum to
one base at most: what requests are charged never exceeds the time they take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import coo_array

from qlm_batch.simulation.fleet import Fleet, InstanceSpec
from qlm_batch.simulation.workload import Requests

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

THETAS: Final = (0.0, 0.5, 0.8, 1.0)
BUCKETS: Final = 20
RUN_ON: Final = 0.99
_CUTS: Final = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 0.95, 1.0)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Most of the weight that can be on time, as fractions.

    `clairvoyant` knows all lengths. `blind` knows their distributions: it may give a request up
    after a number of tokens, but not choose short ones beforehand. `finishing` is blind and
    finishes what it begins.
    """

    clairvoyant: float
    blind: float
    finishing: float


@dataclass(frozen=True, slots=True)
class Machines:
    """Instances alike in everything: one of them, and how many."""

    spec: InstanceSpec
    count: int

    def serves(self, model: str) -> bool:
        """Whether they host the model."""
        return model in self.spec.models


def machines(fleet: Fleet) -> tuple[Machines, ...]:
    """The fleet's kinds of instances, in order of appearance."""
    found: dict[tuple[object, ...], list[InstanceSpec]] = {}
    for spec in fleet.instances:
        key = (spec.device, frozenset(spec.models), spec.slots, spec.kv_tokens)
        found.setdefault(key, []).append(spec)
    return tuple(Machines(specs[0], len(specs)) for specs in found.values())


def machine_seconds(
    spec: InstanceSpec, model: str, prompt: Ints | Floats, output: Ints | Floats, theta: float
) -> Floats:
    """The least time of an instance that requests of these lengths take, at the best batch."""
    step = spec.profile(model).step
    n, m = np.asarray(output, dtype=np.float64), np.asarray(prompt, dtype=np.float64)
    held = n * m + n * (n - 1.0) / 2.0
    shares = theta * n / spec.slots + (1.0 - theta) * held / spec.kv_tokens
    context = (n - 1.0) * m + np.maximum(0.0, (n - 1.0) * (n - 2.0) / 2.0)
    seconds: Floats = (
        step.base * shares + step.per_sequence * n + step.per_kv * context + step.per_prefill * m
    )
    return seconds


def capacity(fleet: Fleet, mix: Sequence[tuple[str, float, Ints, Ints]]) -> float:
    """Requests per second the fleet can serve of a mix of (model, share, prompts, outputs).

    Swaps are free and every batch is the best one. 0 when a model of the mix is served nowhere.
    """
    kinds = machines(fleet)
    best = np.inf
    for theta in THETAS:
        cost = np.array(
            [
                [
                    float(machine_seconds(m.spec, model, prompts, outputs, theta).mean())
                    if m.serves(model)
                    else np.inf
                    for m in kinds
                ]
                for model, _, prompts, outputs in mix
            ]
        )
        best = min(best, _rate(cost, np.array([share for _, share, _, _ in mix]), kinds))
    return float(best)


def _rate(cost: Floats, shares: Floats, kinds: Sequence[Machines]) -> float:
    """Max λ: machine time x[s, m] with Σ_m x/cost ≥ λ·share and Σ_s x ≤ count."""
    streams, types = cost.shape
    size = streams * types + 1
    rows, rhs = [], []
    for s in range(streams):
        row = np.zeros(size)
        with np.errstate(divide="ignore"):
            row[s * types : (s + 1) * types] = -1.0 / cost[s]
        row[-1] = shares[s]
        rows.append(row)
        rhs.append(0.0)
    for t in range(types):
        row = np.zeros(size)
        row[t : streams * types : types] = 1.0
        rows.append(row)
        rhs.append(float(kinds[t].count))
    goal = np.zeros(size)
    goal[-1] = -1.0
    solved = linprog(goal, A_ub=np.array(rows), b_ub=np.array(rhs), method="highs")
    return float(-solved.fun)


def weights(requests: Requests, fleet: Fleet) -> Floats:
    """What each request counts: its class's expected work, on the first kind that serves it."""
    work = _work_anywhere(requests, fleet, requests.output)
    classes = len(requests.classes)
    total = np.bincount(requests.work_class, work, classes)
    mean = total / np.maximum(1, np.bincount(requests.work_class, minlength=classes))
    each: Floats = mean[requests.work_class]
    return each


def _work_anywhere(requests: Requests, fleet: Fleet, output: Ints) -> Floats:
    work = np.zeros(len(requests))
    for index, model in enumerate(requests.models):
        own = requests.model == index
        spec = next((m.spec for m in machines(fleet) if m.serves(model)), None)
        if spec is not None:
            work[own] = machine_seconds(spec, model, requests.prompt[own], output[own], 0.5)
    return work


@dataclass(frozen=True, slots=True)
class _Way:
    """A way to treat requests of one cell, whatever the machine.

    Each is worth `gain` and takes its `prompts` and up to `outputs` tokens, in buckets from `first`
    to `last`; ways of one `pool` share its requests. Where they are `alike` the cheapest stands for
    its like, never more than it takes, else their mean.
    """

    pool: int
    gain: float
    model: str
    prompts: Ints
    outputs: Ints
    alike: bool
    first: int
    last: int

    def cost(self, kinds: Sequence[Machines], theta: float) -> list[float]:
        """Seconds of every kind of machine; inf where the model is not served."""
        found = []
        for machine in kinds:
            if machine.serves(self.model):
                each = machine_seconds(machine.spec, self.model, self.prompts, self.outputs, theta)
                found.append(float(each.min() if self.alike else each.mean()))
            else:
                found.append(np.inf)
        return found


def bounds(requests: Requests, fleet: Fleet, start: float, duration: float) -> Bounds:
    """The bounds for requests that arrive within `duration` of `start`."""
    if not len(requests):
        return Bounds(1.0, 1.0, 1.0)
    weight, kinds = weights(requests, fleet), machines(fleet)
    edges, longest = _edges(requests, fleet, duration)
    best = []
    for cuts in (None, _CUTS, (1.0,)):
        most = 1.0
        ways, pools = _ways(requests, start, edges, longest, weight, cuts)
        for theta in THETAS:
            cost = np.array([way.cost(kinds, theta) for way in ways])
            got = _solve(ways, cost, pools, np.diff(edges), kinds)
            most = min(most, got / float(weight.sum()))
        best.append(most)
    return Bounds(clairvoyant=best[0], blind=min(best[:2]), finishing=min(best))


def _edges(requests: Requests, fleet: Fleet, duration: float) -> tuple[Floats, float]:
    """Bucket edges from 0, and how long an interactive request may run on after its first token.

    Engines serve it through without a break, in steps of a full batch that computes new prompts at
    twice its usual rate; nearly all end within what RUN_ON of them need. Where memory holds fewer
    than the engine has places for, those that began take turns.
    """
    longest = 0.0
    if requests.interactive.any():
        outputs = float(np.quantile(requests.output[requests.interactive], RUN_ON))
        prompt, output = float(requests.prompt.mean()), float(requests.output.mean())
        second = float((requests.output.astype(np.float64) ** 2).mean())
        held = prompt + second / (2.0 * output)
        slowest = max(
            profile.step.seconds(
                spec.slots,
                min(spec.kv_tokens, spec.slots * held),
                min(spec.batched_tokens, 2.0 * spec.slots * prompt / output),
            )
            for spec in fleet.instances
            for profile in spec.profiles
        )
        crowd = max(spec.slots * held / spec.kv_tokens for spec in fleet.instances)
        longest = outputs * slowest * max(1.0, crowd)
    targets = {c.target_s + (longest if c.interactive else 0.0) for c in requests.classes}
    tail = sorted(duration + target for target in targets if target > 0.0)
    return np.concatenate((np.linspace(0.0, duration, BUCKETS + 1), tail)), longest


def _ways(
    requests: Requests,
    start: float,
    edges: Floats,
    longest: float,
    weight: Floats,
    cuts: Sequence[float] | None,
) -> tuple[list[_Way], list[float]]:
    """Ways and the sizes of their pools; batch requests may be given up at `cuts`.

    These are quantiles of their length; None stands for knowing the lengths.
    """
    came = np.clip(np.searchsorted(edges, requests.arrival - start, "right") - 1, 0, BUCKETS - 1)
    ways: list[_Way] = []
    pools: list[float] = []
    cells = (requests.model * len(requests.classes) + requests.work_class) * BUCKETS + came
    for cell in np.unique(cells):
        own = np.flatnonzero(cells == cell)
        work_class = requests.classes[int(requests.work_class[own[0]])]
        model = requests.models[int(requests.model[own[0]])]
        due = float(requests.due[own].max()) - start + (longest if work_class.interactive else 0.0)
        last = int(np.searchsorted(edges, due, "left")) - 1
        first = int(came[own[0]])
        prompt, output = requests.prompt[own], requests.output[own]
        each = float(weight[own[0]])
        if cuts is None:
            for chunk in np.array_split(np.argsort(output, kind="stable"), min(8, len(own))):
                lengths = prompt[chunk], output[chunk]
                ways.append(_Way(len(pools), each, model, *lengths, True, first, last))
                pools.append(float(len(chunk)))
            continue
        for cut in (1.0,) if work_class.interactive else cuts:
            limit = int(np.quantile(output, cut, method="higher"))
            gain = each * float((output <= limit).mean())
            lengths = prompt, np.minimum(output, limit)
            ways.append(_Way(len(pools), gain, model, *lengths, False, first, last))
        pools.append(float(len(own)))
    return ways, pools


def _solve(
    ways: Sequence[_Way],
    cost: Floats,
    pools: Sequence[float],
    widths: Floats,
    kinds: Sequence[Machines],
) -> float:
    """Most weight on time: requests treated each way on each kind of machine in each bucket."""
    buckets = len(widths)
    first = np.array([way.first for way in ways])
    spans = np.maximum(0, np.minimum([way.last + 1 for way in ways], buckets) - first)
    way, machine = np.nonzero(np.isfinite(cost) & (spans > 0)[:, None])
    if not way.size:
        return 0.0
    # A column for each bucket; it has two entries: its pool's, and its machine's in the bucket.
    sizes = spans[way]
    columns = np.arange(sizes.sum())
    bucket = columns - np.repeat(np.cumsum(sizes) - sizes - first[way], sizes)
    rows = (
        np.repeat(np.array([own.pool for own in ways])[way], sizes),
        len(pools) + np.repeat(machine, sizes) * buckets + bucket,
    )
    values = (np.ones(columns.size), np.repeat(cost[way, machine], sizes))
    limits = [*pools, *(m.count * width for m in kinds for width in widths)]
    entries = (np.concatenate(values), (np.concatenate(rows), np.tile(columns, 2)))
    matrix = coo_array(entries, shape=(len(limits), columns.size))
    gain = np.repeat(np.array([own.gain for own in ways])[way], sizes)
    solved = linprog(-gain, A_ub=matrix.tocsr(), b_ub=np.array(limits), method="highs")
    return float(-solved.fun)
