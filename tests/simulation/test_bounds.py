"""Bounds: against closed forms, and against what policies reach."""

from __future__ import annotations

import numpy as np
import pytest

from qlm_batch.domain.jobs import SloClass
from qlm_batch.scheduling.eviction import URGENT_BELOW
from qlm_batch.simulation.bounds import bounds, capacity, machine_seconds
from qlm_batch.simulation.cluster import START, SimulationConfig
from qlm_batch.simulation.devices import profile_of
from qlm_batch.simulation.engine import EngineLimits, ReferenceEngine
from qlm_batch.simulation.fleet import Fleet
from qlm_batch.simulation.results import summary
from qlm_batch.simulation.workload import Arrival, Requests, WorkClass, requests_of
from qlm_batch.simulation.workloads import build, scenario
from tests.simulation.cases import INTERACTIVE, arrival, batch_class, fleet, run, workload


def _requests(arrivals: list[Arrival], window_s: float) -> Requests:
    return requests_of(workload((batch_class(window_s),), arrivals, 10.0), START)


def test_all_of_it_fits_when_there_is_time() -> None:
    got = bounds(_requests([arrival(0.0, lines=40)], 600.0), fleet(1), START, 10.0)
    assert got.clairvoyant == pytest.approx(1.0)
    assert got.blind == pytest.approx(1.0)


def test_a_window_of_half_the_work_bounds_it_by_half() -> None:
    requests = _requests([arrival(0.0, lines=4000)], 10.0)
    (spec,) = fleet(1).instances
    each = float(machine_seconds(spec, "m", np.array([100]), np.array([50]), 1.0)[0])
    got = bounds(requests, fleet(1), START, 10.0)
    # The window ends with the bucket its deadline is in.
    assert got.blind == pytest.approx(10.0 / each / 4000, rel=0.06)
    assert got.blind <= got.clairvoyant + 1e-9


def test_knowing_lengths_is_worth_something_in_overload() -> None:
    rng = np.random.default_rng(0)
    outputs = rng.integers(1, 200, 3000)
    batch = Arrival(0.0, 0, "m", "t", np.full(3000, 100), outputs)
    got = bounds(_requests([batch], 10.0), fleet(1), START, 10.0)
    assert got.blind < got.clairvoyant - 0.02


def test_giving_long_answers_up_is_worth_something_where_few_are_long() -> None:
    outputs = np.where(np.arange(3000) % 10 == 0, 600, 20)
    batch = Arrival(0.0, 0, "m", "t", np.full(3000, 100), outputs)
    got = bounds(_requests([batch], 10.0), fleet(1), START, 10.0)
    assert got.finishing < got.blind - 0.02


def test_a_model_nobody_serves_counts_as_lost() -> None:
    requests = _requests([arrival(0.0, lines=5), arrival(0.0, lines=5, model="x")], 600.0)
    on = Fleet(fleet(1).instances)
    assert bounds(requests, on, START, 10.0).clairvoyant <= 1.0
    assert capacity(on, [("x", 1.0, np.array([10]), np.array([10]))]) == 0.0


def test_capacity_doubles_with_the_fleet() -> None:
    mix = [("m", 1.0, np.array([100, 200]), np.array([50, 10]))]
    assert capacity(fleet(2), mix) == pytest.approx(2.0 * capacity(fleet(1), mix))


@pytest.mark.parametrize("theta", [0.0, 0.5, 1.0])
def test_no_engine_is_faster_than_what_requests_are_charged(theta: float) -> None:
    profile = profile_of("mistral-7b", "a10")
    limits = EngineLimits(16, 4_000)
    engine = ReferenceEngine(limits, profile.step)
    rng = np.random.default_rng(1)
    prompts, outputs = rng.integers(1, 400, 120), rng.integers(1, 400, 120)
    for key in range(120):
        engine.submit(key, int(prompts[key]), int(outputs[key]), URGENT_BELOW, 0.0)
    engine.advance(1e6)
    spec = fleet(1).instances[0]
    like = type(spec)("i", "a10", (profile,), ("mistral-7b",), 16, 4_000)
    charged = float(machine_seconds(like, "mistral-7b", prompts, outputs, theta).sum())
    assert charged <= engine.busy_s
    if theta == 0.5:
        assert charged > 0.5 * engine.busy_s


@pytest.mark.parametrize("name", ["fcfs", "edf-shed", "qlm"])
@pytest.mark.parametrize("every_s", [2.0, 6.0])
def test_no_policy_is_above_a_bound(name: str, every_s: float) -> None:
    rng = np.random.default_rng(int(every_s))
    count = int(40.0 / every_s)
    arrivals = [
        Arrival(
            every_s * n, 1 + n % 2, "m", "t", rng.integers(1, 300, 40), rng.integers(1, 120, 40)
        )
        for n in range(count)
    ]
    arrivals += [arrival(2.0 * n, 0, output=20) for n in range(20)]
    work = workload((INTERACTIVE, batch_class(10.0), batch_class(25.0, "late")), arrivals, 40.0)
    _, outcome = run(fleet(1), work, name, SimulationConfig())
    bound = bounds(requests_of(work, START), fleet(1), START, work.duration)
    reached = summary(outcome, fleet(1), bound)
    assert reached["goodput"] <= reached["bound_clairvoyant"] + 1e-9
    assert reached["goodput"] <= reached["bound"] + 1e-9


def test_giving_nearly_all_up_is_bounded_too() -> None:
    """With windows too short for the long, engines end only the short: a fifth of a great many."""
    rng = np.random.default_rng(0)
    arrivals = [
        Arrival(0.2 * n, 0, "m", "t", np.full(8, 10), np.where(rng.random(8) < 0.2, 1, 4000))
        for n in range(100)
    ]
    work = workload((batch_class(4.0),), arrivals, 20.0)
    _, outcome = run(fleet(1, slots=64), work, "edf")
    bound = bounds(requests_of(work, START), fleet(1, slots=64), START, work.duration)
    reached = summary(outcome, fleet(1, slots=64), bound)
    assert 0.05 < reached["goodput"] <= reached["bound"] + 1e-9


def test_calls_that_crowd_each_other_out_of_memory_are_bounded_too() -> None:
    """Their first tokens come at once, the others when memory lets them."""
    classes = (WorkClass("call", SloClass.INTERACTIVE, 5.0),)
    work = workload(classes, [arrival(0.0, output=3000) for _ in range(40)], 5.0)
    crowded = fleet(1, slots=64)
    _, outcome = run(crowded, work, "edf")
    bound = bounds(requests_of(work, START), crowded, START, work.duration)
    reached = summary(outcome, crowded, bound)
    assert reached["goodput"] <= reached["bound_clairvoyant"] + 1e-9


def test_the_load_of_a_workload_is_its_share_of_the_capacity() -> None:
    chosen = scenario("W1")
    on = chosen.fleet()
    work = build(chosen, on, 1.0, 600.0, 3)
    requests = requests_of(work, START)
    mix = [("mistral-7b", 1.0, requests.prompt, requests.output)]
    offered = len(requests) / 600.0
    assert offered == pytest.approx(capacity(on, mix), rel=0.08)
