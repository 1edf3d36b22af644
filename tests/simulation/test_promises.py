"""Promises of the service on simulated engines: what comes later does not spoil them."""

from __future__ import annotations

import numpy as np
import pytest

from qlm_batch.domain.jobs import SloClass
from qlm_batch.scheduling.policies import policy
from qlm_batch.scheduling.receipts import receipt
from qlm_batch.simulation.cluster import Cluster, SimulationConfig
from qlm_batch.simulation.fleet import Fleet, instances
from qlm_batch.simulation.workload import Arrival, WorkClass, Workload

MODEL = "mistral-7b"
TEMPLATES = ((32, 64), (240, 192), (800, 96))
"""Tokens of a prompt, and the most tokens of its answer."""
BACKLOG = 20
REQUESTS_PER_S = 22.0
SECONDS = 180.0


def batches(seed: int, fresh: bool) -> Workload:
    """Batches of a day's window: some at once and then at random, answers longer at last.

    Unless `fresh`, the service has done some before.
    """
    rng = np.random.default_rng(seed)
    arrivals: list[Arrival] = []

    def add(at: float, lines: int, growth: float = 1.0) -> None:
        prompt, most = TEMPLATES[int(rng.integers(len(TEMPLATES)))]
        prompts = np.maximum(1, rng.normal(prompt, prompt / 20, lines)).astype(np.int64)
        drawn = np.round(64 * np.exp(rng.standard_normal(lines)))
        outputs = np.clip(drawn, 1, round(most * growth)).astype(np.int64)
        arrivals.append(Arrival(at, 0, MODEL, "t", prompts, outputs))

    start = 0.0 if fresh else 60.0
    for _ in range(0 if fresh else BACKLOG):
        add(0.0, 32)
    for _ in range(BACKLOG):
        add(start, int(rng.integers(8, 64)))
    due = 0.0
    while due < SECONDS:
        lines = int(rng.integers(8, 64))
        add(start + due, lines, 1.5 if due > 2 / 3 * SECONDS else 1.0)
        due += float(rng.exponential(lines / REQUESTS_PER_S))
    day = WorkClass("day", SloClass.BATCH, 86_400.0)
    return Workload("batches", (day,), tuple(arrivals), start + SECONDS, 2048)


@pytest.mark.parametrize("fresh", [False, True], ids=["warm", "fresh"])
def test_promises_hold_and_are_narrow(fresh: bool) -> None:
    kept: list[tuple[bool, bool, float]] = []
    for seed in (1, 2, 3, 4):
        fleet = Fleet(instances("a", "a100", (MODEL,), slots=32))
        workload = batches(seed, fresh)
        cluster = Cluster(fleet, workload, policy("qlm"), SimulationConfig(seed=seed, plan_ms=1.0))
        cluster.run()
        for number, arrival in enumerate(workload.arrivals):
            told = receipt(cluster.store.batch("t", f"batch_{number:08}"))
            assert told is not None
            if fresh or arrival.at > 0.0:
                by50, by95 = told.actual_s <= told.p50_s, told.actual_s <= told.p95_s
                kept.append((by50, by95, told.p95_s / told.actual_s))
    by50, by95, _ = np.mean(kept, axis=0)
    assert 0.92 <= by95 < 1.0
    assert 0.25 <= by50 <= 0.65
    assert np.median([own[2] for own in kept]) <= 1.5
