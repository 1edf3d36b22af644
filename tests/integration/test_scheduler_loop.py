"""The scheduler loop over the in-memory store."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from qlm_batch.control.leadership import Leadership
from qlm_batch.control.recording import Recorder
from qlm_batch.control.scheduler_loop import SchedulerConfig, SchedulerLoop
from qlm_batch.domain.errors import Unavailable
from qlm_batch.domain.jobs import (
    CHAT,
    BatchSpec,
    BatchState,
    EngineKind,
    FilePurpose,
    FileRecord,
    RequestLine,
    ResultRow,
)
from qlm_batch.domain.ledger import Held
from qlm_batch.domain.messages import Assigned, Stopped
from qlm_batch.domain.records import Heartbeat
from qlm_batch.domain.snapshot import (
    InstanceState,
    ModelView,
    Observation,
    Output,
    Plan,
    RequestGroup,
    Residency,
    Snapshot,
)
from qlm_batch.domain.store import Store
from qlm_batch.scheduling.calibration import Conformal
from qlm_batch.scheduling.estimator import VERSION
from qlm_batch.scheduling.policies import policy
from qlm_batch.scheduling.policies.base import Policy
from qlm_batch.scheduling.problem import Durations
from qlm_batch.store.memory import MemoryStore

TENANT = "t"


class Hints:
    """A dispatcher that keeps what it was told; `away` makes it fail."""

    def __init__(self) -> None:
        self.told: list[Assigned] = []
        self.away = False

    def assigned(self, message: Assigned) -> None:
        if self.away:
            raise Unavailable("the broker is away")
        self.told.append(message)

    def stopped(self, message: Stopped) -> None:
        raise AssertionError("the scheduler stops no batch")


class Stage:
    """A store with a hand-turned clock, and a scheduler over it."""

    def __init__(self, store: Store | None = None) -> None:
        self.time = 1000.0
        self.store: Store = store or MemoryStore(lambda: self.time)
        self.hints = Hints()
        self.loop = self.scheduler("one")

    def scheduler(self, holder: str, how: Policy | None = None) -> SchedulerLoop:
        how = how or policy("qlm")
        return SchedulerLoop(self.store, self.hints, how, SchedulerConfig(holder), Leadership())

    def beat(
        self,
        name: str = "gpu-0",
        models: Sequence[str] = ("m",),
        *,
        state: InstanceState = InstanceState.READY,
        observations: tuple[Observation, ...] = (),
    ) -> None:
        views = tuple(
            ModelView(
                model,
                EngineKind.GENERATE,
                Residency.ASLEEP if n else Residency.AWAKE,
                4096,
            )
            for n, model in enumerate(models)
        )
        self.store.heartbeat(
            Heartbeat(
                name, f"boot-{name}", "A100", state, views, 32, 10**6, observations=observations
            )
        )

    def submit(
        self, batch_id: str, lines: int, *, model: str = "m", window_s: float = 86_400.0
    ) -> None:
        file_id = f"file-{batch_id}"
        self.store.add_file(
            FileRecord(
                file_id, TENANT, FilePurpose.BATCH, "in.jsonl", 1, "0" * 64, file_id, self.time
            )
        )
        self.store.create_batch(
            batch_id, BatchSpec(TENANT, CHAT, file_id, f"{window_s:.0f}s", window_s)
        )
        claimed = self.store.claim_intake("intake", 30.0)
        assert claimed is not None and claimed.batch.id == batch_id
        self.store.load_lines(
            batch_id,
            "intake",
            (RequestLine(n + 1, f"c{n}", model, "{}", 100, 128) for n in range(lines)),
            64,
        )

    def passes(self, seconds: float, *, step: float = 0.5) -> None:
        until = self.time + seconds
        while self.time < until:
            self.time += step
            self.beat()
            self.loop.tick()

    def finish_all(self) -> None:
        """The instance does at once whatever it was assigned."""
        for part in self.store.claim_slices(
            "gpu-0", "boot-gpu-0", max_requests=10**6, lease_s=30.0
        ):
            rows = [
                ResultRow(
                    part.slice_id,
                    part.epoch,
                    request.run_id,
                    request.position,
                    part.generation,
                    "req",
                    status_code=200,
                    body="{}",
                )
                for request in part.requests
            ]
            held = [Held(part.slice_id, part.epoch, complete=True)]
            self.store.flush("gpu-0", rows, held, lease_s=30.0)


@pytest.fixture
def stage() -> Stage:
    return Stage()


def test_a_tick_plans_assigns_and_hints(stage: Stage) -> None:
    stage.beat()
    stage.submit("b", 1000)
    tick = stage.loop.tick()
    assert tick.replanned
    assert tick.assigned["gpu-0"] >= 1
    assert stage.hints.told == [Assigned("gpu-0", "boot-gpu-0")]
    assert stage.store.queues()
    claimed = stage.store.claim_slices("gpu-0", "boot-gpu-0", max_requests=64, lease_s=30.0)
    assert len(claimed[0].requests) == 64


def test_the_owner_sees_an_estimate_and_the_first_one_is_kept(stage: Stage) -> None:
    stage.beat()
    stage.submit("b", 100)
    stage.loop.tick()
    batch = stage.store.batch(TENANT, "b")
    assert batch.estimate is not None and batch.estimate.p50 is not None
    assert batch.promise is not None and batch.promise.p50 == batch.estimate.p50
    kinds = [decision.kind for decision in stage.store.decisions(TENANT, "b")]
    assert kinds == ["planned", "promised"]


def test_an_instance_is_topped_up_and_not_flooded(stage: Stage) -> None:
    stage.beat()
    stage.submit("b", 64_000)
    stage.passes(5.0)
    view = stage.store.snapshot().instances[0]
    assert 0 < sum(own.requests for own in view.assigned) < 2000


def test_an_instance_that_runs_dry_is_handed_more_and_sooner(stage: Stage) -> None:
    stage.beat()
    stage.submit("b", 64_000)
    calm = stage.loop.idle_s
    handed = []
    for _ in range(4):
        stage.time += 0.5
        stage.beat()
        handed.append(stage.loop.tick().assigned["gpu-0"])
        stage.finish_all()
    assert handed[3] > 4 * handed[0]
    assert stage.loop.idle_s < calm
    stage.passes(20.0)
    assert stage.loop.idle_s == calm


def test_equal_stores_give_equal_plans() -> None:
    entries = []
    for _ in range(2):
        stage = Stage()
        stage.beat()
        stage.beat("gpu-1")
        for n in range(5):
            stage.submit(f"b{n}", 300 + n, window_s=600.0 * (n + 1))
        stage.loop.tick()
        entries.append(stage.store.queues())
    assert entries[0] == entries[1]


def test_a_plan_stands_while_nothing_happens(stage: Stage) -> None:
    stage.beat()
    stage.submit("b", 64)
    stage.submit("c", 64)
    stage.loop.tick()
    stage.time += 0.5
    stage.beat()
    assert stage.loop.tick().replanned == ""


def test_an_arrival_makes_a_new_plan(stage: Stage) -> None:
    stage.beat()
    stage.submit("b", 6400)
    stage.loop.tick()
    stage.time += 0.5
    stage.submit("c", 640, window_s=600.0)
    assert stage.loop.tick().replanned == "work came"


def test_an_instance_that_came_makes_a_new_plan(stage: Stage) -> None:
    stage.beat()
    stage.submit("b", 6400)
    stage.loop.tick()
    stage.time += 0.5
    stage.beat("gpu-1")
    tick = stage.loop.tick()
    assert tick.replanned == "the fleet changed"
    assert tick.assigned.get("gpu-1", 0) > 0


def test_an_old_plan_is_made_anew(stage: Stage) -> None:
    stage.beat()
    stage.submit("b", 6400)
    stage.loop.tick()
    stage.time += 6.0
    stage.beat()
    assert stage.loop.tick().replanned == "the plan is old"


def test_a_standby_does_nothing_until_the_leader_resigns(stage: Stage) -> None:
    stage.beat()
    stage.submit("b", 100)
    stage.loop.tick()
    standby = stage.scheduler("two")
    assert standby.tick().epoch is None
    stage.loop.close()
    assert standby.tick().epoch is not None


def test_a_leader_that_cannot_resign_ends_its_log_all_the_same(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(_: str) -> None:
        raise Unavailable("the database is away")

    stage.beat()
    stage.submit("b", 100)
    path = tmp_path / "log.jsonl.gz"
    config = SchedulerConfig("recorded")
    loop = SchedulerLoop(
        stage.store, stage.hints, policy("qlm"), config, Leadership(), Recorder(path)
    )
    loop.tick()
    monkeypatch.setattr(stage.store, "resign", away)
    with pytest.raises(Unavailable):
        loop.close()
    # Compressed as one piece, it can be read to its end only where it was closed.
    assert gzip.decompress(path.read_bytes())


def test_a_leader_that_was_overtaken_steps_down_quietly(stage: Stage) -> None:
    stage.beat()
    stage.submit("b", 100)
    stage.loop.tick()
    stage.time += 60.0
    assert stage.scheduler("two").tick().epoch is not None
    assert stage.loop.tick().epoch is None


def test_a_lost_hint_costs_nothing_but_time(stage: Stage) -> None:
    stage.hints.away = True
    stage.beat()
    stage.submit("b", 100)
    stage.loop.tick()
    assert stage.store.claim_slices("gpu-0", "boot-gpu-0", max_requests=64, lease_s=30.0)


def test_reports_change_what_is_known(stage: Stage) -> None:
    seen = Observation(
        "gpu-0", "A100", "m", 1.0, (Output(TENANT, 42, 9),) * 50, ((8, 800, 0, 0.1),) * 50
    )
    stage.beat(observations=(seen,))
    stage.loop.tick()
    profiles = {(p.model, p.device) for p in stage.store.snapshot().profiles}
    assert profiles == {("*", "*"), ("m", "*"), ("m", "A100")}


@pytest.mark.parametrize("leaders", [1, 2])
def test_a_promise_is_remembered_whoever_leads_when_it_is_over(stage: Stage, leaders: int) -> None:
    seen = Observation(
        *("gpu-0", "A100", "m", 1.0),
        outputs=(Output(TENANT, 42, 9),) * 500,
        steps=tuple((n, 100 * n, 0, 0.05 + 0.001 * n) for n in range(1, 33)) * 20,
        tokens=21_000,
        requests=500,
        seconds=60.0,
    )
    stage.beat(observations=(seen,))
    stage.submit("b", 640)
    stage.loop.tick()
    if leaders == 2:
        stage.loop.close()
        stage.loop = stage.scheduler("two")
    promise = stage.store.batch(TENANT, "b").promise
    assert promise is not None and promise.p95 is not None
    stage.passes(promise.p95 - stage.time, step=2.0)
    stage.beat(observations=(seen,))
    stage.loop.tick()
    profiles = {(own.model, own.device): own.data for own in stage.store.snapshot().profiles}
    (score,) = Conformal.from_data(profiles["m", "*"]["calibration"]).overdue
    assert score > 1.0


def test_a_model_nobody_serves_fails_its_lines_after_a_grace(stage: Stage) -> None:
    stage.beat()
    stage.submit("b", 100, model="absent")
    stage.passes(25.0)
    waiting = stage.store.batch(TENANT, "b")
    assert waiting.state is BatchState.IN_PROGRESS
    assert waiting.estimate is not None
    assert waiting.estimate.reason == "no instance serves model absent"
    stage.passes(10.0)
    failed = stage.store.batch(TENANT, "b")
    assert failed.state is BatchState.FINALIZING
    assert failed.counts.failed == 100


def test_work_waits_for_an_instance_that_is_lost(stage: Stage) -> None:
    stage.beat("gpu-1", ["away"])
    stage.beat()
    stage.submit("b", 100, model="away")
    stage.passes(120.0)
    assert stage.store.batch(TENANT, "b").state is BatchState.IN_PROGRESS


def test_urgent_work_overtakes_what_is_not_claimed(stage: Stage) -> None:
    stage.beat()
    stage.submit("slow", 64_000)
    stage.passes(2.0)
    stage.submit("urgent", 10, window_s=12.0)
    tick = stage.loop.tick()
    assert tick.recalled == ("gpu-0",) and tick
    stage.loop.tick()
    claimed = stage.store.claim_slices("gpu-0", "boot-gpu-0", max_requests=10, lease_s=30.0)
    assert claimed[0].batch_id == "urgent"


def test_unclaimed_work_is_taken_back_for_what_it_alone_would_make_late(stage: Stage) -> None:
    stage.beat()
    stage.submit("slow", 64_000)
    stage.passes(2.0)
    stage.submit("urgent", 10, window_s=6.0)
    assert stage.loop.tick().recalled == ("gpu-0",)
    assert "recalled" in [d.kind for d in stage.store.decisions(TENANT, "slow")]
    stage.loop.tick()
    estimate = stage.store.batch(TENANT, "urgent").estimate
    assert estimate is not None and (estimate.miss_probability or 0.0) < 0.5
    claimed = stage.store.claim_slices("gpu-0", "boot-gpu-0", max_requests=10, lease_s=30.0)
    assert claimed[0].batch_id == "urgent"


class Fickle:
    """Puts a group first while an instance has unclaimed work, and last when it has none."""

    name = "fickle"

    def plan(
        self,
        snapshot: Snapshot,
        groups: Sequence[RequestGroup],
        estimator: Durations,
        moves: int,
        seed: int,
    ) -> Plan:
        made = policy("edf").plan(snapshot, groups, estimator, moves, seed)
        (queue,) = made.queues
        (view,) = snapshot.instances
        late = [replace(each, finish_mean=each.group.deadline + 1.0) for each in queue.groups]
        unclaimed = any(own.slices > own.leased_slices for own in view.assigned)
        order = tuple(late if unclaimed else reversed(late))
        return replace(made, queues=(replace(queue, groups=order),))


def test_work_is_not_taken_back_and_handed_out_again_without_end() -> None:
    stage = Stage()
    stage.beat()
    stage.submit("slow", 64_000)
    stage.loop.tick()
    stage.loop = stage.scheduler("one", Fickle())
    stage.submit("urgent", 10, window_s=600.0)
    recalled = [bool(stage.loop.tick().recalled) for _ in range(12)]
    assert recalled.count(True) == 1
    stage.passes(6.0)
    stage.time += 6.0
    stage.beat()
    assert any(stage.loop.tick().recalled for _ in range(3))


def test_nothing_is_promised_while_nobody_serves_the_model(stage: Stage) -> None:
    stage.beat()
    stage.submit("b", 100, model="absent")
    stage.loop.tick()
    assert stage.store.batch(TENANT, "b").promise is None
    stage.beat("gpu-1", ["absent"])
    stage.loop.tick()
    promise = stage.store.batch(TENANT, "b").promise
    assert promise is not None and promise.p50 is not None
    assert promise.estimator == VERSION


def test_a_hopeless_batch_is_let_go_with_a_reason(stage: Stage) -> None:
    stage.beat()
    stage.submit("hopeless", 64_000, window_s=2.0)
    stage.loop.tick()
    shed = [d for d in stage.store.decisions(TENANT, "hopeless") if d.kind == "shed"]
    assert len(shed) == 1
    assert "left" in str(shed[0].detail["reason"])


def test_decisions_are_told_once(stage: Stage) -> None:
    stage.beat()
    stage.submit("b", 64_000)
    stage.passes(30.0)
    kinds = [decision.kind for decision in stage.store.decisions(TENANT, "b")]
    assert kinds.count("planned") == 1
    assert kinds.count("promised") == 1


def test_a_config_turns_milliseconds_into_moves() -> None:
    config = SchedulerConfig("one", plan_ms=50.0, moves_per_ms=2.0)
    assert config.moves == 100
    assert replace(config, plan_ms=0.0).moves == 0
