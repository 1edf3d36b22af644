"""How long planning takes: whole plans of two sizes, and one arrival in a standing plan.

A plan is everything from the snapshot on: groups, estimates, arrays, insertion, search, the plan
with its reasons and every batch's estimate. As in the service, the garbage collector is held.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

if __name__ == "__main__":
    # Not this folder: its queue.py would hide the standard library's.
    sys.path.pop(0)

import numpy as np

from qlm_batch.control.collecting import collector_held
from qlm_batch.control.scheduler_loop import SchedulerConfig
from qlm_batch.domain.jobs import EngineKind, OnMiss, SloClass
from qlm_batch.domain.snapshot import (
    AssignedView,
    InstanceState,
    InstanceView,
    ModelView,
    Observation,
    Output,
    Profile,
    RequestGroup,
    Residency,
    RunView,
    Snapshot,
)
from qlm_batch.scheduling.compiled import AVAILABLE
from qlm_batch.scheduling.estimator import Estimator
from qlm_batch.scheduling.grouping import form_groups
from qlm_batch.scheduling.policies import policy
from qlm_batch.scheduling.policies.base import standing
from qlm_batch.scheduling.problem import Problem
from qlm_batch.scheduling.profile import fold
from qlm_batch.scheduling.promises import ends_of, with_estimates
from qlm_batch.scheduling.replanning import Incumbent, ReplanConfig, carried_on, fleet_signature

MODELS = tuple(f"model-{n}-{size}b" for n, size in enumerate((7, 7, 13, 13, 70)))
DEVICES = ("A100-80GB", "A10-24GB")


def situation(groups: int, machines: int, seed: int, load: float = 1.1) -> Snapshot:
    """A fleet at work and a queue of about `groups` groups that wants `load` of it."""
    rng = np.random.default_rng(seed)
    fleet = []
    for i in range(machines):
        first = int(rng.integers(len(MODELS)))
        hosted = [first, *(k for k in range(len(MODELS)) if k != first and rng.random() < 0.4)]
        ages = tuple(int(age) for age in rng.integers(1, 400, size=32))
        fleet.append(
            InstanceView(
                name=f"gpu-{i:04}",
                boot_id="boot",
                device=DEVICES[int(rng.random() < 0.4)],
                state=InstanceState.READY,
                models=tuple(
                    ModelView(
                        MODELS[k],
                        EngineKind.GENERATE,
                        Residency.ASLEEP if n else Residency.AWAKE,
                        4096,
                    )
                    for n, k in enumerate(hosted)
                ),
                slots=64,
                kv_tokens=200_000,
                running=32,
                interactive_running=0,
                generated=ages,
                assigned=(_held(i, MODELS[first]),),
            )
        )
    snapshot = Snapshot(1e6, (), tuple(fleet), profiles=_learned(rng))
    estimator = Estimator(snapshot)
    runs, work_s = [], 0.0
    for n in range(groups):
        model = MODELS[min(len(MODELS) - 1, int(rng.zipf(1.6)) - 1)]
        run = _run(n, model, snapshot.now, rng)
        flow = next(
            estimator.flow(i, model, EngineKind.GENERATE, run.tenant, 250.0, 512.0)
            for i in range(machines)
            if estimator.serves(i, model)
        )
        work_s += run.requests * flow.request_s
        runs.append(run)
    # Windows are stretched until the queue's work is `load` of what the fleet can do in them.
    window = work_s / (machines * load)
    spread = rng.choice((0.1, 0.4, 1.0), size=groups) * window * rng.uniform(0.8, 1.2, groups)
    return replace(
        snapshot,
        runs=tuple(
            replace(run, deadline=snapshot.now + max(30.0, float(left)))
            for run, left in zip(runs, spread, strict=True)
        ),
    )


def _run(number: int, model: str, now: float, rng: np.random.Generator) -> RunView:
    requests = int(rng.integers(32, 64))
    return RunView(
        run_id=number,
        generation=1,
        batch_id=f"batch-{number}",
        tenant=f"tenant-{int(rng.integers(4))}",
        model=model,
        kind=EngineKind.GENERATE,
        slo_class=SloClass.BATCH,
        deadline=now,
        created_at=now - float(rng.uniform(0, 600)),
        on_miss=OnMiss.EXPIRE,
        slices=1,
        requests=requests,
        prompt_tokens=requests * 250,
        max_tokens=requests * int(rng.choice((256, 512, 1024))),
    )


def _held(number: int, model: str) -> AssignedView:
    return AssignedView(
        10**6 + number, 1, "batch-held", "tenant-0", model, 2e6, 1, 1, 64, 16_000, 32_768
    )


def _learned(rng: np.random.Generator) -> tuple[Profile, ...]:
    seen = [
        Observation(
            "gpu-0000",
            device,
            model,
            1.0,
            tuple(
                Output(
                    f"tenant-{int(rng.integers(4))}", int(rng.lognormal(5, 1)) + 1, _prompt(rng)
                )
                for _ in range(200)
            ),
            tuple((32, 12_000, 100, 0.03) for _ in range(50)),
        )
        for model in MODELS
        for device in DEVICES
    ]  # fmt: skip
    return fold((), seen)


def _prompt(rng: np.random.Generator) -> int:
    return int(rng.lognormal(5.5, 1.0)) + 1


def timed(call: Callable[[], object], cpu: list[float] | None = None) -> float:
    """Milliseconds of one call; `cpu` takes those the processor spent on it.

    Rubbish of what came before is removed first, so that it is not counted here.
    """
    gc.collect()
    began, spent = time.perf_counter(), time.thread_time()
    call()
    took, spent = time.perf_counter() - began, time.thread_time() - spent
    if cpu is not None:
        cpu.append(spent * 1e3)
    return took * 1e3


def sized(groups: int, machines: int, seed: int) -> Snapshot:
    """A situation whose queue makes `groups` groups, within a fiftieth."""
    runs = _runs_for.get((groups, machines), groups)
    for _ in range(8):
        snapshot = situation(runs, machines, seed)
        found = len(formed_in(snapshot))
        if abs(found - groups) <= groups / 50:
            _runs_for[groups, machines] = runs
            return snapshot
        runs = round(runs * groups / found)
    raise SystemExit(f"no queue of about {groups} groups was found")


_runs_for: dict[tuple[int, int], int] = {}
"""How many runs made so many groups last; the next situation begins with as many."""


def formed_in(snapshot: Snapshot) -> tuple[RequestGroup, ...]:
    """The snapshot's groups."""
    return form_groups(snapshot, Estimator(snapshot).capacities(snapshot))


def whole_plans(groups: int, machines: int, runs: int, moves: int) -> list[float]:
    """Milliseconds of whole plans, a new situation each."""
    times: list[float] = []
    cpu: list[float] = []
    for seed in range(runs + 1):
        snapshot = sized(groups, machines, seed)

        def plan(now: Snapshot = snapshot) -> None:
            with collector_held():
                estimator = Estimator(now)
                work = form_groups(now, estimator.capacities(now))
                made = policy("qlm").plan(now, work, estimator, moves, 0)
                with_estimates(made, ends_of(made, now, estimator))

        times.append(timed(plan, cpu))
    print(
        f"{groups} groups, {machines} instances: plan median {np.median(times[1:]):.1f} ms, "
        f"p99 {np.percentile(times[1:], 99):.1f} ms, of the processor median "
        f"{np.median(cpu[1:]):.1f}, p99 {np.percentile(cpu[1:], 99):.1f} ms"
    )
    return times[1:]


def arrivals(groups: int, machines: int, runs: int, moves: int) -> list[float]:
    """Milliseconds of placing one more group in a standing plan."""
    snapshot = sized(groups, machines, 1)
    estimator = Estimator(snapshot)
    formed = formed_in(snapshot)
    plan = policy("qlm").plan(snapshot, formed, estimator, moves, 0)
    incumbent = Incumbent(plan, snapshot.now, fleet_signature(snapshot))
    times, whole = [], []
    for n in range(runs + 1):
        source = formed[(7 * n) % len(formed)]
        late = snapshot.now + 2.0 * (max(g.deadline for g in formed) - snapshot.now)
        new = replace(source, key=f"new-{n}", deadline=late)
        now = [*formed, new]
        problem = Problem(snapshot, now, estimator)
        kept = standing(problem, plan)
        assert kept is not None and len(kept.new) == 1
        _ = problem.columns
        times.append(timed(partial(kept.insert, problem)))
        assert not kept.new
        fresh = Estimator(snapshot)
        whole.append(timed(partial(carried_on, snapshot, now, fresh, incumbent, ReplanConfig())))
    print(f"the whole pass around it, all times renewed: median {np.median(whole[1:]):.1f} ms")
    print(
        f"one arrival: median {np.median(times[1:]):.2f} ms, p99 {np.percentile(times[1:], 99):.2f}"
    )
    return times[1:]


def main() -> None:
    """Print a table, and the figures as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="10 runs of each")
    options = parser.parse_args()
    runs = 10 if options.quick else options.runs
    moves = SchedulerConfig("benchmark").moves
    print(f"numba {'compiles' if AVAILABLE else 'is missing'}; {moves} moves a plan")
    small = whole_plans(2000, 100, runs, moves)
    large = whole_plans(5000, 1000, max(10, runs // 3), moves)
    one = arrivals(2000, 100, runs, moves)
    print(
        json.dumps(
            {
                "full_2000x100_ms_p99": round(float(np.percentile(small, 99)), 2),
                "full_5000x1000_ms_p99": round(float(np.percentile(large, 99)), 2),
                "arrival_ms_p99": round(float(np.percentile(one, 99)), 2),
            }
        )
    )


if __name__ == "__main__":
    main()
