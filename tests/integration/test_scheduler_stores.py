"""One loop, two stores: a tick makes the same plan over memory and over PostgreSQL."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from qlm_batch.control.leadership import Leadership
from qlm_batch.control.recording import Recorder
from qlm_batch.control.scheduler_loop import SchedulerConfig, SchedulerLoop
from qlm_batch.domain.snapshot import Observation, Output, Snapshot
from qlm_batch.domain.store import Store
from qlm_batch.scheduling.policies import policy
from qlm_batch.simulation.replay import replay
from qlm_batch.store.memory import MemoryStore
from qlm_batch.store.postgres import PostgresStore
from tests.integration.test_scheduler_loop import TENANT, Stage

NOON = 1_000_000.0
GRAIN_S = 60.0


class StillStore:
    """A store whose snapshots are all of one moment, with other times on a grid around it.

    What the test does takes both stores different milliseconds, which no plan should hang on.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._begin = store.now()

    def begin(self) -> None:
        """The grid starts now."""
        self._begin = self._store.now()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def snapshot(self) -> Snapshot:
        taken = self._store.snapshot()
        runs = tuple(
            replace(run, deadline=self._still(run.deadline), created_at=self._still(run.created_at))
            for run in taken.runs
        )
        fleet = tuple(
            replace(
                view,
                assigned=tuple(
                    replace(own, deadline=self._still(own.deadline)) for own in view.assigned
                ),
            )
            for view in taken.instances
        )
        return replace(taken, now=NOON, runs=runs, instances=fleet)

    def _still(self, at: float) -> float:
        return NOON + round((at - self._begin) / GRAIN_S) * GRAIN_S


@pytest.fixture
def stages(postgres_url: str) -> Iterator[tuple[Stage, Stage]]:
    key = base64.urlsafe_b64encode(bytes(32))
    # Nobody is lost for the time that compiling takes between two reports.
    postgres = PostgresStore(postgres_url, secret_key=key, pool_size=2, instance_silent_s=3600.0)
    stores = (MemoryStore(lambda: 5000.0), postgres)
    memory_stage, postgres_stage = (Stage(cast(Store, StillStore(store))) for store in stores)
    yield memory_stage, postgres_stage
    postgres.close()


def story(stage: Stage) -> list[Any]:
    """Two passes over a mixed queue: what was planned, assigned, promised and decided."""
    # The story told before may have taken long: the first of all compiles the loops.
    cast(StillStore, stage.store).begin()
    seen = Observation(
        "gpu-0", "A100", "m", 1.0, (Output(TENANT, 300, 9),) * 60, ((16, 4000, 0, 0.02),) * 60
    )
    stage.beat(observations=(seen,))
    stage.beat("gpu-1", ["n", "m"])
    for number in range(6):
        stage.submit(
            f"b{number}",
            200 * (number + 1),
            model="mn"[number % 2],
            window_s=600.0 * (6 - number),
        )
    stage.submit("hopeless", 20_000, window_s=60.0)
    told: list[Any] = []
    for _ in range(2):
        tick = stage.loop.tick()
        told.append((tick.replanned, tick.groups, dict(tick.assigned), tick.recalled))
        order = {run.run_id: n for n, run in enumerate(stage.store.snapshot().runs)}
        told.append(
            [
                (entry.instance, entry.position, entry.slices, entry.reason, *_place(entry, order))
                for entry in stage.store.queues()
            ]
        )
        stage.beat()
    for number in range(6):
        batch = stage.store.batch(TENANT, f"b{number}")
        assert batch.estimate is not None and batch.promise is not None
        told.append(
            (
                batch.estimate.p50,
                batch.estimate.p95,
                batch.estimate.miss_probability,
                batch.promise.estimator,
                [(made.kind, made.instance) for made in stage.store.decisions(TENANT, batch.id)],
            )
        )
    return told


def _place(entry: Any, order: dict[int, int]) -> tuple[int | None, str]:
    """A group's key with its run by rank, as stores number runs in their own way."""
    run, _, rest = entry.group_key.partition(".")
    return order.get(int(run)), rest


def test_a_tick_makes_the_same_plan_over_memory_and_postgres(
    stages: tuple[Stage, Stage],
) -> None:
    memory, postgres = (story(stage) for stage in stages)
    assert memory == postgres
    assert any("left" in entry[3] for entry in memory[1])


def test_the_log_of_a_scheduler_on_postgres_replays_to_the_same_plans(
    stages: tuple[Stage, Stage], tmp_path: Path
) -> None:
    _, stage = stages
    path = tmp_path / "log.jsonl.gz"
    stage.loop = SchedulerLoop(
        stage.store,
        stage.hints,
        policy("qlm"),
        SchedulerConfig("one"),
        Leadership(),
        Recorder(path),
    )
    story(stage)
    stage.loop.close()
    told = replay(path)
    assert told.plans == told.same > 0
    assert sum(len(arrival.prompts) for arrival in told.history.arrivals) > 20_000
