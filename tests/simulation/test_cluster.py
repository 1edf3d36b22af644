"""The real scheduler over simulated instances."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from qlm_batch.domain.jobs import BatchState, OnMiss
from qlm_batch.scheduling.policies import OraclePolicy, policy
from qlm_batch.scheduling.swapping import STAY_SWAPS
from qlm_batch.simulation.cluster import START, Cluster, SimulationConfig
from qlm_batch.simulation.results import summary
from qlm_batch.simulation.workload import Outage, Workload
from tests.simulation.cases import INTERACTIVE, arrival, batch_class, fleet, run, workload

CLASSES = (INTERACTIVE, batch_class(60.0), batch_class(600.0))


def _mixed(outages: tuple[Outage, ...] = ()) -> Workload:
    arrivals = [arrival(0.7 * n, 0, output=20) for n in range(40)]
    arrivals += [arrival(5.0 * n, 1, lines=30) for n in range(6)]
    arrivals += [arrival(7.0 * n, 2, lines=100) for n in range(4)]
    return workload(CLASSES, arrivals, 40.0, outages)


@pytest.mark.parametrize("name", ["fcfs", "edf", "edf-shed", "qlm"])
def test_every_request_ends_once(name: str) -> None:
    cluster, outcome = run(fleet(2), _mixed(), name)
    requests = outcome.requests
    assert outcome.unfinished == 0
    assert np.isfinite(requests.end[requests.interactive]).all()
    ended = 0
    for batch in cluster.store.list_batches("t", limit=100).items:
        assert batch.counts.completed + batch.counts.failed == batch.counts.total
        assert batch.state in (BatchState.COMPLETED, BatchState.EXPIRED)
        ended += batch.counts.completed
    assert ended == int(np.isfinite(requests.end[~requests.interactive]).sum())


def test_every_request_ends_once_although_an_instance_dies() -> None:
    work = _mixed((Outage(10.0, 0, 20.0),))
    cluster, outcome = run(fleet(2), work)
    batches = cluster.store.list_batches("t", limit=100).items
    assert outcome.unfinished == 0
    assert all(b.counts.completed + b.counts.failed == b.counts.total for b in batches)
    assert sum(b.counts.failed for b in batches) == 0
    # Interactive requests in the middle of their answer are lost with the instance.
    lost = int(np.isnan(outcome.requests.end[outcome.requests.interactive]).sum())
    assert lost <= 4


def test_nothing_ends_before_it_arrived_or_before_its_first_token() -> None:
    _, outcome = run(fleet(2), _mixed())
    requests = outcome.requests
    done = np.isfinite(requests.end)
    assert (requests.first[done] > requests.arrival[done]).all()
    assert (requests.end[done] >= requests.first[done]).all()


def test_equal_seeds_give_equal_bytes() -> None:
    def told() -> str:
        _, outcome = run(fleet(2), _mixed(), "qlm")
        times = [outcome.requests.first.tolist(), outcome.requests.end.tolist()]
        return json.dumps([summary(outcome, fleet(2)), times])

    assert told() == told()


def test_interactive_requests_do_not_wait_for_batch_work() -> None:
    arrivals = [arrival(0.0, 2, lines=400, output=100)]
    arrivals += [arrival(10.0 + n, 0, output=10) for n in range(10)]
    _, outcome = run(fleet(1), workload(CLASSES, arrivals, 20.0))
    requests = outcome.requests
    waits = (requests.first - requests.arrival)[requests.interactive]
    # One step in progress, one with the prompt, and the hop.
    assert waits.max() < 0.06
    assert sum(t.preemptions for t in outcome.tallies.values()) > 0


def test_a_lone_request_takes_the_time_of_its_steps() -> None:
    _, outcome = run(fleet(1), workload(CLASSES, [arrival(1.0, 0, output=11)], 2.0))
    steps_s = 11 * 0.02 + 100 * 1e-5
    assert outcome.requests.end[0] - START == pytest.approx(1.0 + 0.005 + steps_s, abs=1e-5)


def test_a_swap_takes_the_time_it_takes() -> None:
    models = ("m", "n")
    work = workload((batch_class(600.0),), [arrival(0.0, lines=4, model="n", output=10)], 10.0)
    _, outcome = run(fleet(1, models, weights_gb=150.0), work)
    (tallies,) = outcome.tallies.values()
    # 150 GB at 15 GB/s, out and in.
    assert tallies.swaps == 1
    assert tallies.swap_s == pytest.approx(20.0)
    assert (outcome.requests.first - START).min() > 20.0


def test_work_of_an_awake_model_is_done_before_a_swap() -> None:
    arrivals = [arrival(0.0, lines=50, model="m"), arrival(0.0, lines=50, model="n")]
    _, outcome = run(fleet(1, ("m", "n")), workload((batch_class(600.0),), arrivals, 5.0))
    (tallies,) = outcome.tallies.values()
    assert tallies.swaps == 1
    of_m, of_n = outcome.requests.end[:50], outcome.requests.first[50:]
    assert of_m.max() < of_n.min()


def test_what_missed_its_deadline_is_stopped_or_finished_late() -> None:
    # 8 slots, 1 s each: 120 lines take 15 s, and have 10.
    work = workload((batch_class(10.0),), [arrival(0.0, lines=120)], 5.0)
    _, expired = run(fleet(1), work, "edf", SimulationConfig(on_miss=OnMiss.EXPIRE))
    _, late = run(fleet(1), work, "edf", SimulationConfig(on_miss=OnMiss.FINISH_LATE))
    assert 0 < np.isfinite(expired.requests.end).sum() < 120
    assert np.isfinite(late.requests.end).all()
    assert 0 < late.requests.on_time.sum() < 120


def test_in_overload_shedding_beats_plain_edf() -> None:
    # 8 requests a second can be served, and 20 come.
    arrivals = [arrival(2.0 * n, lines=40) for n in range(30)]
    work = workload((batch_class(15.0),), arrivals, 60.0)
    config = SimulationConfig(on_miss=OnMiss.FINISH_LATE, drain_s=600.0)
    shed, plain = (run(fleet(1), work, name, config)[1] for name in ("edf-shed", "edf"))
    assert shed.requests.on_time.mean() >= plain.requests.on_time.mean()
    assert shed.requests.on_time.mean() > 0.25


def test_progress_is_told_in_virtual_seconds() -> None:
    told: list[float] = []

    work = workload((batch_class(600.0),), [arrival(0.0, lines=4)], 5.0)
    Cluster(fleet(1), work, policy("edf"), SimulationConfig()).run(told.append)
    assert told and told[0] >= 0.0 and math.isfinite(told[-1])


def test_the_oracle_knows_how_long_a_batch_will_take() -> None:
    # By max_tokens alone the second batch is as long as the first; only one of them can be on time.
    lines = [arrival(0.0, lines=64, output=250), arrival(0.0, lines=64, output=5)]
    work = workload((batch_class(20.0),), lines, 5.0)
    cluster = Cluster(fleet(1), work, OraclePolicy, SimulationConfig(drain_s=600.0))
    requests = cluster.run().requests
    assert requests.on_time[64:].all()


def test_an_interactive_request_for_a_sleeping_model_makes_its_instance_swap() -> None:
    arrivals = [arrival(0.0, 2, lines=200, output=100), arrival(5.0, 0, model="n", output=10)]
    on = fleet(1, ("m", "n"), weights_gb=15.0)
    _, outcome = run(on, workload(CLASSES, arrivals, 10.0))
    requests = outcome.requests
    waited = float((requests.first - requests.arrival)[requests.interactive][0])
    # 15 GB at 15 GB/s, out and in; what was running is given back, not drained.
    assert 2.0 < waited < 2.5
    assert np.isfinite(requests.end).all()
    assert next(iter(outcome.tallies.values())).swaps == 2


def test_calls_for_one_model_and_batch_work_of_another_take_turns_without_thrash() -> None:
    # 8 slots, 2 s each: 480 lines of m take 120 s, while somebody asks n something every second.
    arrivals = [arrival(0.0, 2, lines=480, output=100)]
    arrivals += [arrival(5.0 + n, 0, model="n", output=10) for n in range(240)]
    on = fleet(1, ("m", "n"), weights_gb=15.0)
    _, outcome = run(on, workload(CLASSES, arrivals, 245.0))
    requests, (tallies,) = outcome.requests, outcome.tallies.values()
    assert np.isfinite(requests.end).all()
    # A swap takes 2 s, a stay of batch work at least four of that, one of calls at most twelve.
    span = outcome.ended_at - START
    assert tallies.swap_s <= span / 3
    waits = (requests.first - requests.arrival)[requests.interactive]
    assert waits.max() < (STAY_SWAPS + 3) * 2.0 + 2.0


def test_a_swap_that_fails_takes_the_time_of_loading_as_well() -> None:
    def swapping(failures: float) -> float:
        work = workload(
            (batch_class(600.0),), [arrival(0.0, model="n")], 5.0, swap_failures=failures
        )
        _, outcome = run(fleet(1, ("m", "n"), weights_gb=15.0), work)
        return next(iter(outcome.tallies.values())).swap_s

    assert swapping(0.0) == pytest.approx(2.0)
    assert swapping(1.0) == pytest.approx(12.0)


def test_progress_is_told_while_work_arrives() -> None:
    work = workload((batch_class(60.0),), [arrival(2.0 * n, lines=4) for n in range(20)], 40.0)
    heard: list[float] = []
    Cluster(fleet(1), work, policy("edf"), SimulationConfig()).run(heard.append)
    assert len([seconds for seconds in heard if 0.0 < seconds < 40.0]) >= 3


def test_what_an_engine_did_counts_once_where_the_run_ends_in_a_swap() -> None:
    arrivals = [arrival(0.0, 1, lines=8, output=50), arrival(0.5, 0, model="n")]
    work = workload(CLASSES, arrivals, 8.0)
    on = fleet(1, ("m", "n"), weights_gb=150.0)
    _, outcome = run(on, work, "edf", SimulationConfig(drain_s=0.0))
    (tallies,) = outcome.tallies.values()
    assert tallies.swaps == 1 and tallies.swap_s > outcome.ended_at - START
    assert tallies.generated == 8 * 50
