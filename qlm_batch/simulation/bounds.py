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
class _Option:
    """A way to treat requests of one cell: what each is worth and takes on every kind of machine.

    At most `most` requests may be treated so; options of one `pool` share its requests.
    """

    pool: int
    gain: float
    most: float
    cost: tuple[float, ...]
    first: int
    last: int


def bounds(requests: Requests, fleet: Fleet, start: float, duration: float) -> Bounds:
    """The bounds for requests that arrive within `duration` of `start`."""
    if not len(requests):
        return Bounds(1.0, 1.0, 1.0)
    weight = weights(requests, fleet)
    best = []
    for cuts in (None, _CUTS, (1.0,)):
        most = 1.0
        for theta in THETAS:
            options, pools, edges = _options(requests, fleet, start, duration, weight, theta, cuts)
            got = _solve(options, pools, np.diff(edges), machines(fleet))
            most = min(most, got / float(weight.sum()))
        best.append(most)
    return Bounds(clairvoyant=best[0], blind=min(best[:2]), finishing=min(best))


def _edges(requests: Requests, fleet: Fleet, start: float, duration: float) -> tuple[Floats, float]:
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


def _options(
    requests: Requests,
    fleet: Fleet,
    start: float,
    duration: float,
    weight: Floats,
    theta: float,
    cuts: Sequence[float] | None,
) -> tuple[list[_Option], list[float], Floats]:
    """Options, their pools and the edges of buckets; batch requests may be given up at `cuts`.

    These are quantiles of their length; None stands for knowing the lengths.
    """
    edges, longest = _edges(requests, fleet, start, duration)
    kinds = machines(fleet)
    came = np.clip(np.searchsorted(edges, requests.arrival - start, "right") - 1, 0, BUCKETS - 1)
    options: list[_Option] = []
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

        def cost(outputs: Ints, model: str = model, prompt: Ints = prompt) -> Floats:
            return np.array(
                [
                    machine_seconds(m.spec, model, prompt, outputs, theta)
                    if m.serves(model)
                    else np.full(len(prompt), np.inf)
                    for m in kinds
                ]
            )

        each = float(weight[own[0]])
        if cuts is None:
            seconds = cost(output)
            for chunk in np.array_split(np.argsort(output, kind="stable"), min(8, len(own))):
                # The cheapest stands for its like: never more than it takes.
                least = tuple(seconds[:, chunk].min(axis=1).tolist())
                options.append(_Option(len(pools), each, len(chunk), least, first, last))
                pools.append(float(len(chunk)))
            continue
        for cut in (1.0,) if work_class.interactive else cuts:
            limit = int(np.quantile(output, cut, method="higher"))
            mean = tuple(cost(np.minimum(output, limit)).mean(axis=1).tolist())
            share = float((output <= limit).mean())
            options.append(_Option(len(pools), each * share, len(own), mean, first, last))
        pools.append(float(len(own)))
    return options, pools, edges


def _solve(
    options: Sequence[_Option], pools: Sequence[float], widths: Floats, kinds: Sequence[Machines]
) -> float:
    """Most weight on time: requests of each option on each kind of machine in each bucket."""
    buckets, size = len(widths), 0
    gain: list[Floats] = []
    rows: list[Ints] = []
    columns: list[Ints] = []
    values: list[Floats] = []
    for option in options:
        spans = np.arange(option.first, min(option.last + 1, buckets))
        pool = np.full(spans.size, option.pool)
        for machine, seconds in enumerate(option.cost):
            if np.isfinite(seconds) and spans.size:
                # Each column has two entries: its pool's, and its machine's in its bucket.
                own = size + np.arange(spans.size)
                rows += [pool, len(pools) + machine * buckets + spans]
                columns += [own, own]
                values += [np.ones(spans.size), np.full(spans.size, seconds)]
                gain.append(np.full(spans.size, -option.gain))
                size += spans.size
    if not gain:
        return 0.0
    limits = [*pools, *(m.count * width for m in kinds for width in widths)]
    entries = (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns)))
    matrix = coo_array(entries, shape=(len(limits), size))
    solved = linprog(
        np.concatenate(gain), A_ub=matrix.tocsr(), b_ub=np.array(limits), method="highs"
    )
    return float(-solved.fun)
