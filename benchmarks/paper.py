"""The QLM paper's experiments (SoCC 2024) in our simulator, beside the figures it published.

Its fleet of 30 A10 and 50 A100 becomes one of 1 and 2, or 3 and 5; rates shrink with what the fleet
can do; a trace has 3,500 requests, as there, of lengths like ShareGPT's. Its SLOs are on the time
to the first token; ours on that for interactive requests, but on the last token of batch requests,
which is harder. Its traces, models and warm-up are not known in detail, so its figures say where it
stood against its own baselines.

    python benchmarks/paper.py [--quick] [--seeds 3] [--plots docs/paper]
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Not this folder: its queue.py would hide the standard library's.
    sys.path.pop(0)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")

import numpy as np
import structlog

from qlm_batch.domain.jobs import SloClass
from qlm_batch.scheduling.policies import policy
from qlm_batch.simulation.cluster import Cluster, SimulationConfig
from qlm_batch.simulation.devices import DeviceProfile
from qlm_batch.simulation.fleet import Fleet, InstanceSpec, instances
from qlm_batch.simulation.results import mean_interval, summary
from qlm_batch.simulation.workload import WorkClass, Workload
from qlm_batch.simulation.workloads import (
    BATCH_1,
    INTERACTIVE,
    Scenario,
    build,
    capacity_of,
    scenario,
)

HOUR = WorkClass("batch-2", SloClass.BATCH, 3600.0)
REQUESTS = 3500
"""In a trace, about, as in the paper."""
MODELS = tuple(f"mistral-7b@{letter}" for letter in "abcdef")
A10_SHARES = (0, 1, 2, 4, 5)
"""How many of five instances are A10."""
POLICIES = ("fcfs", "edf", "shepherd", "qlm-paper", "qlm")
FULL, PAPER, EDF, VLLM, SHEPHERD = "qlm", "QLM", "EDF", "vLLM", "SHEPHERD"

PUBLISHED: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    "W_A": {
        PAPER: {"0.5": 95, "1": 87, "2": 54, "8": 14, "10": 12},
        EDF: {"0.5": 75, "1": 68, "2": 46, "8": 11, "10": 9},
        SHEPHERD: {"0.5": 10, "1": 10, "2": 11, "8": 10, "10": 10},
        VLLM: {"0.5": 10, "1": 10, "2": 10, "8": 10, "10": 8},
    },
    "W_B": {
        PAPER: {"0.25": 95, "0.5": 87, "1": 54, "4": 14, "5": 12},
        EDF: {"0.25": 55, "0.5": 37, "1": 21, "4": 5, "5": 4},
        SHEPHERD: {"0.25": 9, "0.5": 10, "1": 9, "4": 5, "5": 4},
        VLLM: {"0.25": 10, "0.5": 9, "1": 9, "4": 5, "5": 4},
    },
    "devices": {PAPER: {"0": 100, "20": 100, "40": 100, "80": 100, "100": 100}},
    "queue": {
        PAPER: {"4": 97.5, "8": 95.1, "12": 94.1},
        EDF: {"4": 83, "8": 73, "12": 72},
        VLLM: {"4": 26, "8": 13, "12": 9},
    },
    "mega": {},
    "ablation": {PAPER: {"full": 100, "no swaps": 80, "pinned": 90, "cold": 50}},
}
PICTURES = {"rates": ("W_A", "W_B"), "others": ("devices", "queue", "mega", "ablation")}
ABOUT: Mapping[str, tuple[str, str]] = {
    "W_A": ("one model, three classes", "requests/s, thousands (paper's fleet)"),
    "W_B": ("six models, batch classes", "requests/s, thousands (paper's fleet)"),
    "devices": ("A10 in the fleet, at 80 % load", "A10, % (the paper measured 50, not 40)"),
    "queue": ("queued at once, six models", "requests, thousands"),
    "mega": ("W_B at 0.5, some prompts of 3–4k tokens", "mega prompts, %"),
    "ablation": ("W_B at 0.8, parts of ours left out", "what is left out"),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One point of an experiment: a fleet and the work it is asked, by seed."""

    fleet: Fleet
    work: Callable[[int], Workload]


@dataclass(frozen=True, slots=True)
class Cold(DeviceProfile):
    """A model that has to be read from storage each time it wakes."""

    @property
    def wake_s(self) -> float:
        """As from storage."""
        return self.load_s


def fleet(models: Sequence[str], a10: int = 3, a100: int = 5) -> Fleet:
    """So many of each device, every one hosting all models."""
    return Fleet(
        (
            *instances("a10", "a10", models, a10, rotate=True),
            *instances("a100", "a100", models, a100, rotate=True),
        )
    )


def at_rate(name: str, on: Fleet, thousands: float, seed: int) -> Workload:
    """The load that so many thousand requests a second are for the paper's fleet.

    W_A is W1 in the paper's classes, W_B is W2.
    """
    classes = (INTERACTIVE, BATCH_1, HOUR) if name == "W1" else (BATCH_1, HOUR)
    chosen = replace(scenario(name), classes=classes)
    load = 1000.0 * thousands / capacity_of(chosen, fleet(on.models, 30, 50), seed)
    return _trace(chosen, on, load, seed)


def at_load(name: str, on: Fleet, load: float, seed: int) -> Workload:
    """The same at a load of this fleet."""
    chosen = replace(scenario(name), classes=(INTERACTIVE, BATCH_1, HOUR))
    return _trace(chosen, on, load, seed)


def _trace(chosen: Scenario, on: Fleet, load: float, seed: int) -> Workload:
    seconds = REQUESTS / (load * capacity_of(chosen, on, seed))
    return build(chosen, on, load, seconds, seed)


def at_once(on: Fleet, requests: int, seed: int) -> Workload:
    """So many requests of W_B that wait already at the start."""
    chosen = replace(scenario("W2"), classes=(BATCH_1, HOUR))
    work = build(chosen, on, requests / capacity_of(chosen, on, seed), 1.0, seed)
    return replace(work, arrivals=tuple(replace(a, at=0.0) for a in work.arrivals))


def mega(on: Fleet, share: float, seed: int) -> Workload:
    """W_B at 0.5 with this share of prompts of 3 to 4 thousand tokens."""
    work, rng = at_rate("W2", on, 0.5, seed), np.random.default_rng((seed, 9))
    arrivals = []
    for arrival in work.arrivals:
        long = rng.uniform(size=len(arrival.prompts)) < share
        prompts = np.where(long, rng.integers(3000, 4000, len(long)), arrival.prompts)
        arrivals.append(replace(arrival, prompts=prompts))
    return replace(work, arrivals=tuple(arrivals))


def pinned(on: Fleet) -> Fleet:
    """Every instance with two neighbouring models only: nothing can be balanced over the fleet."""
    kept = []
    for number, spec in enumerate(on.instances):
        own = tuple(MODELS[(number + n) % len(MODELS)] for n in range(2))
        kept.append(_hosting(spec, own))
    return Fleet(tuple(kept))


def dedicated(on: Fleet) -> Fleet:
    """Every instance with one model, by their popularity: nothing is ever swapped."""
    slow, fast = iter((4, 5, 1)), iter((0, 0, 1, 2, 3))
    return Fleet(
        tuple(
            _hosting(spec, (MODELS[next(slow if spec.device == "a10" else fast)],))
            for spec in on.instances
        )
    )


def _hosting(spec: InstanceSpec, models: tuple[str, ...]) -> InstanceSpec:
    profiles = tuple(spec.profile(model) for model in models)
    return replace(spec, models=models, profiles=profiles)


def cold(on: Fleet) -> Fleet:
    """No model is kept warm."""
    return Fleet(
        tuple(
            replace(
                spec,
                profiles=tuple(
                    Cold(**{name: getattr(p, name) for name in DeviceProfile.__slots__})
                    for p in spec.profiles
                ),
            )
            for spec in on.instances
        )
    )


def cases() -> dict[str, dict[str, Case]]:
    """Every experiment's points by their label on the axis."""
    one, many, large = fleet(("mistral-7b",), 1, 2), fleet(MODELS, 1, 2), fleet(MODELS)
    made: dict[str, dict[str, Case]] = {
        "W_A": {
            label: Case(one, partial(at_rate, "W1", one, float(label)))
            for label in PUBLISHED["W_A"][PAPER]
        },
        "W_B": {
            label: Case(many, partial(at_rate, "W2", many, float(label)))
            for label in PUBLISHED["W_B"][PAPER]
        },
        "queue": {
            label: Case(large, partial(at_once, large, int(label) * 1000))
            for label in PUBLISHED["queue"][PAPER]
        },
        "mega": {
            label: Case(many, partial(mega, many, float(label) / 100)) for label in ("0", "5", "20")
        },
        "devices": {},
        "ablation": {},
    }
    for a10 in A10_SHARES:
        mixed = fleet(("mistral-7b",), a10, 5 - a10)
        made["devices"][f"{20 * a10}"] = Case(mixed, partial(at_load, "W1", mixed, 0.8))
    asked = partial(at_rate, "W2", large, 0.8)
    parts = {
        "full": large,
        "no swaps": dedicated(large),
        "pinned": pinned(large),
        "cold": cold(large),
    }
    made["ablation"] = {label: Case(on, asked) for label, on in parts.items()}
    return made


Job = tuple[str, str, str, int]
"""Experiment, label, policy and seed."""


def run(job: Job) -> tuple[Job, dict[str, float]]:
    """One run: requests on time in %, output tokens per second."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    experiment, label, name, seed = job
    case = cases()[experiment][label]
    config = SimulationConfig(seed=seed)
    outcome = Cluster(case.fleet, case.work(seed), policy(name), config).run()
    told = summary(outcome, case.fleet)
    met = 100.0 * float(outcome.requests.on_time.mean())
    return job, {"met": met, "tokens_per_s": told["output_tokens_per_s"]}


def jobs(
    seeds: int, experiments: Sequence[str], names: Sequence[str], points: Sequence[str]
) -> Iterator[Job]:
    """All runs of these policies, at these points where any are named; the ablation is of ours."""
    for experiment in experiments:
        for label in cases()[experiment]:
            if points and label not in points:
                continue
            for name in (FULL,) if experiment == "ablation" else names:
                for seed in range(seeds):
                    yield experiment, label, name, seed


Table = dict[str, dict[str, dict[str, tuple[float, float]]]]
"""By experiment, policy and label: the mean of what was met, and its 95 % interval."""


def tables(found: Mapping[Job, Mapping[str, float]]) -> Table:
    """Means over seeds."""
    made: Table = {}
    for experiment, label, name, _ in found:
        own = [r["met"] for job, r in found.items() if job[:3] == (experiment, label, name)]
        made.setdefault(experiment, {}).setdefault(name, {})[label] = mean_interval(own)
    return made


def show(made: Table) -> None:
    """One table for each experiment, the paper's figures below ours."""
    for experiment, ours in made.items():
        title, axis = ABOUT[experiment]
        labels = list(next(iter(ours.values())))
        print(f"\n{experiment}: {title}; % of SLOs met by {axis}")
        print(f"  {'':14}" + "".join(f"{label:>15}" for label in labels))
        for name, points in ours.items():
            row = "".join(f"{points[x][0]:9.1f} ± {points[x][1]:3.1f}" for x in labels)
            print(f"  {name:14}{row}")
        for name, known in PUBLISHED[experiment].items():
            print(f"  paper {name:8}" + "".join(f"{known.get(x, ''):>15}" for x in labels))


def draw(made: Table, folder: Path) -> None:
    """A picture of the two workloads against the rate, and one of the other experiments."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    mpl.rcParams |= {"svg.hashsalt": "qlm", "svg.fonttype": "none"}
    for name, experiments in PICTURES.items():
        known = [e for e in experiments if e in made]
        if not known:
            continue
        figure, axes = plt.subplots(1, len(known), figsize=(4.6 * len(known), 4.2), squeeze=False)
        for axis, experiment in zip(axes[0], known, strict=True):
            _lines(axis, experiment, made[experiment])
        handles: dict[str, Any] = {}
        for axis in axes[0]:
            lines, names = axis.get_legend_handles_labels()
            handles |= dict(zip(names, lines, strict=True))
        columns = 2 * len(known)
        below = 0.07 * -(-len(handles) // columns)
        figure.legend(
            handles.values(), handles.keys(), loc="lower center", ncols=columns, frameon=False
        )
        figure.tight_layout(rect=(0.0, below, 1.0, 1.0))
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        figure.savefig(folder / f"{name}.png", dpi=80)
        plt.close(figure)


_COLORS = {
    "fcfs": "tab:gray",
    "edf": "tab:blue",
    "shepherd": "tab:green",
    "qlm-paper": "tab:orange",
    FULL: "tab:red",
    PAPER: "tab:orange",
    EDF: "tab:blue",
    VLLM: "tab:gray",
    SHEPHERD: "tab:green",
}
_Points = Mapping[str, tuple[float, float]]


def _lines(axis: Any, experiment: str, ours: Mapping[str, _Points]) -> None:
    """Ours as lines with intervals, what was published dashed."""
    labels = list(next(iter(ours.values())))
    for name, points in ours.items():
        axis.errorbar(
            range(len(labels)),
            [points[x][0] for x in labels],
            yerr=[points[x][1] for x in labels],
            marker="o",
            capsize=3,
            color=_COLORS[name],
            label=f"{name}, simulated",
            linewidth=2.4 if name == FULL else 1.4,
            zorder=3 if name == FULL else 2,
        )
    for name, known in PUBLISHED[experiment].items():
        own = [n for n, x in enumerate(labels) if x in known]
        axis.plot(
            own,
            [known[labels[n]] for n in own],
            "s--",
            color=_COLORS[name],
            label=f"{name}, published",
            markersize=4,
            linewidth=1.0,
            alpha=0.7,
        )
    title, name = ABOUT[experiment]
    axis.set_xticks(range(len(labels)), labels)
    axis.set_xlabel(name)
    axis.set_ylabel("SLOs met, %")
    axis.set_ylim(0.0, 105.0)
    axis.set_title(f"{experiment}: {title}", fontsize=9)
    axis.grid(alpha=0.3)


def main() -> int:
    """Run what is asked, print the tables, and all figures as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--seeds", type=int, default=None, help="default: 3")
    parser.add_argument("--experiments", default=",".join(ABOUT))
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--points", default="", help="labels on the axis; default: all")
    parser.add_argument("--plots", type=Path, default=None, help="folder for pictures")
    parser.add_argument("--journal", type=Path, default=None, help="keeps finished runs")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    asked = parser.parse_args()
    seeds = asked.seeds or (1 if asked.quick else 3)
    lists = (asked.experiments, asked.policies, asked.points)
    wanted = list(jobs(seeds, *([x for x in text.split(",") if x] for text in lists)))
    found: dict[Job, dict[str, float]] = {}
    if asked.journal is not None and asked.journal.exists():
        for line in asked.journal.read_text().splitlines():
            job, result = json.loads(line)
            found[tuple(job)] = result
    left, began = [job for job in wanted if job not in found], time.monotonic()
    with multiprocessing.get_context("spawn").Pool(asked.processes) as pool:
        for number, (job, result) in enumerate(pool.imap_unordered(run, left), 1):
            found[job] = result
            if asked.journal is not None:
                with asked.journal.open("a") as file:
                    file.write(json.dumps([job, result]) + "\n")
            print(f"{number}/{len(left)} {job}: {result}", file=sys.stderr, flush=True)
    made = tables({job: found[job] for job in wanted})
    print(f"{seeds} seeds, {time.monotonic() - began:.0f} s")
    show(made)
    if asked.plots is not None:
        draw(made, asked.plots)
    print(json.dumps({"published": PUBLISHED, "simulated": made}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
