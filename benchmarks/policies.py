"""What the scheduling policies are worth: dynamic runs of the workloads beside their bounds.

Every policy sees the same arrivals (paired seeds); intervals are of 95 % over seeds. Weight is the
expected work of a request's class. With `--journal FILE` finished runs are kept and not repeated.

    python benchmarks/policies.py [--quick] [--workloads W1,W2] [--loads 0.9,1.2] [--seeds 3] ...
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

if __name__ == "__main__":
    # Not this folder: its queue.py would hide the standard library's.
    sys.path.pop(0)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")

import structlog

from qlm_batch.domain.jobs import SloClass
from qlm_batch.scheduling.policies import POLICIES, OraclePolicy, policy
from qlm_batch.simulation.bounds import bounds
from qlm_batch.simulation.cluster import START, Cluster, SimulationConfig
from qlm_batch.simulation.fleet import Fleet
from qlm_batch.simulation.results import Json, mean_interval, summary
from qlm_batch.simulation.workload import Workload, requests_of
from qlm_batch.simulation.workloads import SCENARIOS, Scenario, build, scenario

LOADS = (0.5, 0.7, 0.9, 1.0, 1.2, 1.5)
ALL = (*POLICIES, "oracle")
OURS, BASE, BOUND, PAPER = "qlm", "edf-shed", "bound", "qlm-paper"
BASELINES = tuple(name for name in POLICIES if name != OURS)


@dataclass(frozen=True, slots=True)
class Setting:
    """How long arrivals come, the longest batch window, and the time between passes; seconds.

    `slots` bounds the running batch of every instance, 0 for what the device holds; `plan_ms` the
    search of one plan.
    """

    duration: float = 900.0
    window: float = 300.0
    tick: float = 0.5
    slots: int = 0
    plan_ms: float = 100.0


QUICK = Setting(duration=75.0, window=120.0, tick=1.0, plan_ms=20.0)
QUICKER = {"W1": replace(QUICK, duration=180.0, window=90.0)}
"""One model on two instances is quick to simulate, and overloaded only after a while."""


@dataclass(frozen=True, slots=True)
class Job:
    """One run, or with `bound` as its policy the bounds of what all policies are asked."""

    workload: str
    load: float
    policy: str
    seed: int
    setting: Setting

    @property
    def key(self) -> str:
        """Names the run in a journal."""
        return json.dumps(asdict(self), sort_keys=True)


def shortened(chosen: Scenario, window: float) -> Scenario:
    """The scenario with no batch window longer than this, so that a run holds several."""
    classes = tuple(
        replace(c, target_s=min(c.target_s, window)) if c.kind is SloClass.BATCH else c
        for c in chosen.classes
    )
    return replace(chosen, classes=classes)


@lru_cache(maxsize=1)
def asked_of(workload: str, load: float, seed: int, setting: Setting) -> tuple[Fleet, Workload]:
    """What every policy is asked in turn, and of which fleet."""
    chosen = shortened(scenario(workload), setting.window)
    fleet = chosen.fleet()
    if setting.slots:
        smaller = (replace(s, slots=min(s.slots, setting.slots)) for s in fleet.instances)
        fleet = replace(fleet, instances=tuple(smaller))
    return fleet, build(chosen, fleet, load, setting.duration, seed)


def run(job: Job) -> tuple[Job, Json, float]:
    """One run's summary and the seconds of processor time it took."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    began, setting = time.process_time(), job.setting
    fleet, work = asked_of(job.workload, job.load, job.seed, setting)
    if job.policy == BOUND:
        most = bounds(requests_of(work, START), fleet, START, work.duration)
        told = {"bound": most.blind, "clairvoyant": most.clairvoyant, "finishing": most.finishing}
    else:
        how = OraclePolicy if job.policy == "oracle" else policy(job.policy)
        config = SimulationConfig(seed=job.seed, tick_s=setting.tick, plan_ms=setting.plan_ms)
        told = summary(Cluster(fleet, work, how, config).run(), fleet)
    return job, told, time.process_time() - began


def results(
    jobs: Sequence[Job], processes: int, journal: Path | None
) -> Iterator[tuple[Job, Json]]:
    """Every job's result as it ends, those in the journal first."""
    known: dict[str, Json] = {}
    if journal is not None and journal.exists():
        known = dict(json.loads(line) for line in journal.read_text().splitlines())
    yield from ((job, known[job.key]) for job in jobs if job.key in known)
    left = [job for job in jobs if job.key not in known]
    # The longest first, so that no process ends long after the others.
    left.sort(key=lambda job: (job.policy != PAPER, -job.load))
    with multiprocessing.Pool(processes) as pool:
        for number, (job, result, cpu_s) in enumerate(pool.imap_unordered(run, left), 1):
            if journal is not None:
                with journal.open("a") as file:
                    file.write(json.dumps([job.key, result]) + "\n")
            goodput = f"{100 * result['goodput']:.2f} %" if job.policy != BOUND else ""
            print(
                f"{number}/{len(left)} {job.workload} at {job.load:g}, {job.policy},"
                f" seed {job.seed}: {goodput} ({cpu_s:.1f} s)",
                file=sys.stderr,
                flush=True,
            )
            yield job, result


@dataclass(slots=True)
class Cell:
    """All seeds of one workload at one load: results by policy, in the order of the seeds."""

    workload: str
    load: float
    runs: dict[str, dict[int, Json]]

    def values(self, name: str, field: str) -> list[float]:
        """One figure of a policy's runs, by seed; what was not measured is left out."""
        own = (self.runs[name][seed][field] for seed in sorted(self.runs[name]))
        return [value for value in own if value is not None]

    def mean(self, name: str, field: str) -> float | None:
        """Its mean, None where nothing was measured."""
        values = self.values(name, field)
        return mean_interval(values)[0] if values else None

    def goodput(self, name: str) -> float:
        """Mean goodput of a policy."""
        return mean_interval(self.values(name, "goodput"))[0]

    def lead(self, name: str) -> tuple[float, float]:
        """How much more goodput ours has than this policy, paired by seed, and its interval."""
        ours, theirs = self.values(OURS, "goodput"), self.values(name, "goodput")
        return mean_interval([a - b for a, b in zip(ours, theirs, strict=True)])

    def rows(self) -> Iterator[Json]:
        """A row for every policy."""
        bound, clairvoyant, finishing = (
            self.mean(BOUND, field) for field in ("bound", "clairvoyant", "finishing")
        )
        for name in (n for n in ALL if n in self.runs):
            goodput, half = mean_interval(self.values(name, "goodput"))
            yield {
                "workload": self.workload,
                "load": self.load,
                "policy": name,
                "goodput": round(goodput, 5),
                "goodput_ci": round(half, 5),
                "bound": _rounded(bound),
                "bound_clairvoyant": _rounded(clairvoyant),
                "bound_finishing": _rounded(finishing),
                "interactive": _rounded(self.mean(name, "interactive")),
                "batch": _rounded(self.mean(name, "batch")),
                "swaps_per_h": _rounded(self.mean(name, "swaps_per_h"), 2),
            }


def _rounded(value: float | None, digits: int = 5) -> float | None:
    return None if value is None else round(value, digits)


def cells(found: Iterable[tuple[Job, Json]]) -> list[Cell]:
    """Results by workload and load, both ascending."""
    made: dict[tuple[str, float], Cell] = {}
    for job, result in found:
        key = (job.workload, job.load)
        cell = made.setdefault(key, Cell(*key, runs={}))
        cell.runs.setdefault(job.policy, {})[job.seed] = result
    return [made[key] for key in sorted(made)]


def marks(cell: Cell) -> Mapping[str, bool]:
    """Which of the marks that apply to this cell are met."""
    met: dict[str, bool] = {}
    if OURS not in cell.runs or BOUND not in cell.runs:
        return met
    ours, bound = cell.goodput(OURS), cell.mean(BOUND, "bound") or 1.0
    if cell.workload in ("W1", "W2", "W3") and cell.load <= 1.2:
        met["of the bound"] = ours >= (0.95 if cell.load <= 0.9 else 0.92) * bound
    interactive = cell.mean(OURS, "interactive")
    if interactive is not None and cell.load <= 1.2:
        met["interactive"] = interactive >= 0.99
    rivals = [name for name in BASELINES if name in cell.runs]
    if rivals:
        met["no baseline ahead"] = all(cell.lead(name)[0] >= -0.005 for name in rivals)
    if BASE in cell.runs:
        base = cell.goodput(BASE)
        wide = bound - base > 0.02
        met["gap closed"] = ours >= ((base + bound) / 2 if wide else bound - 0.005)
        theirs, swaps = (cell.mean(name, "swaps_per_h") or 0.0 for name in (BASE, OURS))
        if theirs >= 10.0:
            met["swaps"] = swaps <= 0.6 * theirs and ours >= base - 0.0005
    return met


def show(cell: Cell) -> None:
    """The cell's table, with what ours leads by and which marks it misses."""
    rows = list(cell.rows())
    bound, clairvoyant, finishing = (
        "  ?  " if rows[0][name] is None else f"{100 * rows[0][name]:.1f}"
        for name in ("bound", "bound_clairvoyant", "bound_finishing")
    )
    print(
        f"\n{cell.workload} at {cell.load:g}: bound {bound}, clairvoyant {clairvoyant}, "
        f"finishing what is begun {finishing} %"
    )
    print(f"  {'policy':10} {'goodput':>8} {'±':>5} {'qlm leads by':>15}"
          f" {'interactive':>11} {'batch':>7} {'swaps/h':>8}")  # fmt: skip
    for row in rows:
        lead = ""
        if OURS in cell.runs and row["policy"] != OURS:
            ahead, half = cell.lead(row["policy"])
            lead = f"{100 * ahead:+.2f} ± {100 * half:.2f}"
        interactive, batch = (
            "" if row[name] is None else f"{100 * row[name]:.2f}"
            for name in ("interactive", "batch")
        )
        print(f"  {row['policy']:10} {100 * row['goodput']:8.2f} {100 * row['goodput_ci']:5.2f}"
              f" {lead:>15} {interactive:>11} {batch:>7} {row['swaps_per_h']:8.1f}")  # fmt: skip
    missed = [name for name, met in marks(cell).items() if not met]
    if missed:
        print(f"  missed: {', '.join(missed)}")


def tally(met: Sequence[Mapping[str, bool]]) -> dict[str, str]:
    """For each mark, in how many of the cells it applies to it is met."""
    names = dict.fromkeys(name for one in met for name in one)
    return {
        name: f"{sum(one.get(name, False) for one in met)}/{sum(name in one for one in met)}"
        for name in names
    }


def main() -> int:
    """Run the grid, print the table, and all rows as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="W1 to W3, short runs of one seed")
    parser.add_argument("--workloads", default=None, help="default: all; W1,W2,W3 if quick")
    parser.add_argument("--loads", default=",".join(map(str, LOADS)))
    parser.add_argument("--policies", default=",".join(ALL))
    parser.add_argument("--seeds", type=int, default=None, help="default: 10; 1 if quick")
    parser.add_argument("--duration", type=float, default=None, help="virtual seconds of arrivals")
    parser.add_argument("--window", type=float, default=None, help="longest batch window, seconds")
    parser.add_argument("--tick", type=float, default=None, help="seconds between passes")
    parser.add_argument("--slots", type=int, default=None, help="largest running batch")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--journal", type=Path, default=None)
    asked = parser.parse_args()
    given = {
        name: getattr(asked, name)
        for name in ("duration", "window", "tick", "slots")
        if getattr(asked, name) is not None
    }
    usual = QUICK if asked.quick else Setting()
    own = QUICKER if asked.quick else {}
    names = asked.workloads or ("W1,W2,W3" if asked.quick else ",".join(SCENARIOS))
    seeds = asked.seeds or (1 if asked.quick else 10)
    jobs = [
        Job(workload, load, name, seed, replace(own.get(workload, usual), **given))
        for seed in range(seeds)
        for load in map(float, asked.loads.split(","))
        for workload in names.split(",")
        for name in (BOUND, *asked.policies.split(","))
    ]
    began = time.monotonic()
    found = cells(results(jobs, asked.processes, asked.journal))
    print(f"{usual} {own or ''}, {given or 'as it is'}; {seeds} seeds,", end=" ")
    print(f"{time.monotonic() - began:.0f} s")
    for cell in found:
        show(cell)
    told = tally([marks(cell) for cell in found])
    print(f"\nmarks met: {told}")
    print(json.dumps({"rows": [row for cell in found for row in cell.rows()], "marks": told}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
