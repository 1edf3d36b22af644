"""The workloads W1–W8 by name: seeded, at a load relative to what the fleet can do at best.

Lengths are log-normal like ShareGPT's: prompts of median 123 and 95th percentile 860 tokens,
outputs of 128 and 730.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from qlm_batch.domain.errors import ConfigurationError
from qlm_batch.domain.jobs import SloClass
from qlm_batch.simulation.bounds import capacity
from qlm_batch.simulation.fleet import Fleet, instances
from qlm_batch.simulation.workload import Arrival, Floats, Ints, Outage, WorkClass, Workload

MAX_TOKENS: Final = 2048
INTERACTIVE: Final = WorkClass("interactive", SloClass.INTERACTIVE, 20.0)
BATCH_1: Final = WorkClass("batch-1", SloClass.BATCH, 60.0)
BATCH_2: Final = WorkClass("batch-2", SloClass.BATCH, 600.0)
"""The paper's hour, shortened so that a run of some minutes holds several windows."""
_ZIPF: Final = 1.0
_PROMPT: Final = (123.0, 860.0)
_OUTPUT: Final = (128.0, 730.0)
_Z95: Final = 1.6449
_SAMPLE: Final = 20_000


@dataclass(frozen=True, slots=True)
class Stream:
    """Requests of one class, model and tenant: `share` of all, in batches of about `lines`.

    `rate` is the arrival rate over time relative to its mean, `stretch` the output lengths; both
    take the elapsed share of the run.
    """

    work_class: int
    model: str
    share: float
    lines: int = 1
    tenant: str = "t"
    rate: Callable[[Floats], Floats] = np.ones_like
    stretch: Callable[[Floats], Floats] = np.ones_like


@dataclass(frozen=True, slots=True)
class Scenario:
    """A named workload: its classes, the fleet it is meant for, and its streams on any fleet."""

    name: str
    about: str
    classes: tuple[WorkClass, ...]
    fleet: Callable[[], Fleet]
    streams: Callable[[Fleet], tuple[Stream, ...]]
    outages: tuple[Outage, ...] = ()
    """Times and lengths as shares of the duration."""
    swap_failures: float = 0.0


def _uniform(count: int = 2, models: tuple[str, ...] = ("mistral-7b",)) -> Fleet:
    return Fleet(instances("a100", "a100", models, count, rotate=True))


def _mixed() -> Fleet:
    models = ("mistral-7b@a", "mistral-7b@b")
    return Fleet(
        (
            *instances("a10", "a10", models, 2, rotate=True),
            *instances("a100", "a100", models, 2, rotate=True),
            *instances("h100", "h100", models, 1),
        )
    )


def _variants(count: int) -> tuple[str, ...]:
    return tuple(f"mistral-7b@{chr(ord('a') + n)}" for n in range(count))


def _zipf(models: tuple[str, ...]) -> tuple[tuple[str, float], ...]:
    popularity = 1.0 / np.arange(1, len(models) + 1) ** _ZIPF
    return tuple(zip(models, (popularity / popularity.sum()).tolist(), strict=True))


_ThreeClasses = Callable[[Fleet], tuple[Stream, ...]]


def _three(**how: Callable[[Floats], Floats]) -> _ThreeClasses:
    def streams(fleet: Fleet) -> tuple[Stream, ...]:
        return tuple(
            replace(stream, model=model, share=stream.share * share, **how)  # type: ignore[arg-type]
            for model, share in _zipf(fleet.models)
            for stream in (
                Stream(0, "", 1 / 3),
                Stream(1, "", 1 / 3, lines=16),
                Stream(2, "", 1 / 3, lines=128),
            )
        )

    return streams


def _batches(fleet: Fleet) -> tuple[Stream, ...]:
    return tuple(
        stream
        for model, share in _zipf(fleet.models)
        for stream in (
            Stream(0, model, share / 2, lines=32),
            Stream(1, model, share / 2, lines=128),
        )
    )


def _bursts(elapsed: Floats) -> Floats:
    """Eight bursts of four times the base rate, each a fifth of its period."""
    busy = (elapsed * 8.0) % 1.0 < 0.2
    return np.where(busy, 4.0, 1.0) / 1.6


def _drift(elapsed: Floats) -> Floats:
    """Half as long, twice as long, and back."""
    return np.asarray(2.0 ** np.sin(2.0 * np.pi * elapsed), dtype=np.float64)


def _day(elapsed: Floats) -> Floats:
    """One quiet and one busy half."""
    return np.asarray(1.0 + 0.8 * np.sin(2.0 * np.pi * elapsed), dtype=np.float64)


def _tenants(fleet: Fleet) -> tuple[Stream, ...]:
    model = fleet.models[0]
    calm = [
        Stream(work_class, model, 0.1, lines, tenant)
        for tenant in ("anna", "ben", "carl")
        for work_class, lines in ((0, 16), (1, 64))
    ]
    return (*calm, Stream(1, model, 0.4, 512, "greedy"))


def _beside_a_day(fleet: Fleet) -> tuple[Stream, ...]:
    return tuple(
        stream
        for model, share in _zipf(fleet.models)
        for stream in (
            Stream(0, model, 0.4 * share, rate=_day),
            Stream(1, model, 0.6 * share, lines=512),
        )
    )


SCENARIOS: Final[Mapping[str, Scenario]] = {
    scenario.name: scenario
    for scenario in (
        Scenario(
            "W1",
            "one model, three classes",
            (INTERACTIVE, BATCH_1, BATCH_2),
            _uniform,
            _three(),
        ),
        Scenario(
            "W2",
            "six models of Zipf popularity on four instances",
            (WorkClass("batch-1", SloClass.BATCH, 180.0), BATCH_2),
            lambda: _uniform(4, _variants(6)),
            _batches,
        ),
        Scenario(
            "W3",
            "three kinds of devices, two models",
            (WorkClass("batch-1", SloClass.BATCH, 180.0), BATCH_2),
            _mixed,
            _batches,
        ),
        Scenario(
            "W4",
            "bursts",
            (INTERACTIVE, BATCH_1, BATCH_2),
            _uniform,
            _three(rate=_bursts),
        ),
        Scenario(
            "W5",
            "output lengths that drift",
            (INTERACTIVE, BATCH_1, BATCH_2),
            _uniform,
            _three(stretch=_drift),
        ),
        Scenario(
            "W6",
            "three tenants and a greedy one",
            (BATCH_1, BATCH_2),
            _uniform,
            _tenants,
        ),
        Scenario(
            "W7",
            "day-long batch windows beside interactive traffic",
            (
                WorkClass("interactive", SloClass.INTERACTIVE, 2.0),
                WorkClass("day", SloClass.BATCH, 86_400.0),
            ),
            _uniform,
            _beside_a_day,
        ),
        Scenario(
            "W8",
            "instances lost and swaps that fail",
            (WorkClass("batch-1", SloClass.BATCH, 180.0), BATCH_2),
            lambda: _uniform(4, _variants(2)),
            _batches,
            (Outage(0.25, 0, 0.1), Outage(0.6, 1, 0.2)),
            0.1,
        ),
    )
}


def scenario(name: str) -> Scenario:
    """The workload of this name. ConfigurationError when there is none."""
    try:
        return SCENARIOS[name.upper()]
    except KeyError:
        raise ConfigurationError(
            f"No workload is named {name!r}; use one of {', '.join(SCENARIOS)}.", param="workload"
        ) from None


def build(chosen: Scenario, fleet: Fleet, load: float, duration: float, seed: int) -> Workload:
    """The scenario on a fleet: `load` 1 is the rate at which the capacity LP is just feasible.

    ConfigurationError when the fleet serves none of its work.
    """
    streams = chosen.streams(fleet)
    room = _room(fleet)
    most = capacity_of(chosen, fleet, seed)
    arrivals: list[Arrival] = []
    for number, stream in enumerate(streams):
        rng = np.random.default_rng((seed, 1, number))
        arrivals += _arrivals(rng, stream, load * most, duration, room)
    arrivals.sort(key=lambda arrival: arrival.at)
    outages = tuple(
        Outage(o.at * duration, o.instance % len(fleet.instances), o.seconds * duration)
        for o in chosen.outages
    )
    return Workload(
        chosen.name,
        chosen.classes,
        tuple(arrivals),
        duration,
        MAX_TOKENS,
        outages,
        chosen.swap_failures,
    )


def capacity_of(chosen: Scenario, fleet: Fleet, seed: int) -> float:
    """Requests per second of the scenario at load 1. ConfigurationError when nothing is served."""
    streams, room = chosen.streams(fleet), _room(fleet)
    lengths = np.random.default_rng((seed, 0))
    sample = _lengths(lengths, np.linspace(0.0, 1.0, _SAMPLE), streams[0], room)
    most = capacity(
        fleet,
        [
            (
                s.model,
                s.share,
                *(
                    sample
                    if s.stretch is streams[0].stretch
                    else _lengths(lengths, np.linspace(0.0, 1.0, _SAMPLE), s, room)
                ),
            )
            for s in streams
        ],
    )
    if most <= 0.0:
        raise ConfigurationError(f"No instance of the fleet serves the models of {chosen.name}.")
    return most


def _room(fleet: Fleet) -> int:
    return min(spec.kv_tokens for spec in fleet.instances) - 64


def _arrivals(
    rng: np.random.Generator, stream: Stream, total: float, duration: float, room: int
) -> list[Arrival]:
    """A Poisson process, thinned where its rate varies."""
    peak = float(stream.rate(np.linspace(0.0, 1.0, 1000)).max())
    rate = total * stream.share / stream.lines * peak
    times = rng.uniform(0.0, duration, rng.poisson(rate * duration))
    kept = rng.uniform(0.0, peak, len(times)) < stream.rate(times / duration)
    arrivals = []
    for at in np.sort(times[kept]).tolist():
        # Half to one and a half times the usual size.
        lines = (
            1 if stream.lines == 1 else int(rng.integers(stream.lines // 2, stream.lines * 3 // 2))
        )
        elapsed = np.full(lines, at / duration)
        prompts, outputs = _lengths(rng, elapsed, stream, room)
        arrivals.append(
            Arrival(at, stream.work_class, stream.model, stream.tenant, prompts, outputs)
        )
    return arrivals


def _lengths(
    rng: np.random.Generator, elapsed: Floats, stream: Stream, room: int
) -> tuple[Ints, Ints]:
    count = len(elapsed)
    prompts = _log_normal(rng, *_PROMPT, count)
    outputs = _log_normal(rng, *_OUTPUT, count) * stream.stretch(elapsed)
    most = min(MAX_TOKENS, room // 2)
    return (
        np.clip(prompts, 1, most).astype(np.int64),
        np.clip(outputs, 1, most).astype(np.int64),
    )


def _log_normal(rng: np.random.Generator, median: float, p95: float, count: int) -> Floats:
    spread = np.log(p95 / median) / _Z95
    return rng.lognormal(np.log(median), spread, count)
