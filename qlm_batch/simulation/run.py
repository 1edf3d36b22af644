"""Policies side by side: the same arrivals for each, over loads and seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qlm_batch.control.recording import Recorder
from qlm_batch.domain.errors import InvalidInput
from qlm_batch.simulation.bounds import bounds
from qlm_batch.simulation.cluster import START, Choice, Cluster, Outcome, SimulationConfig
from qlm_batch.simulation.fleet import Fleet
from qlm_batch.simulation.results import Json, mean_interval, summary
from qlm_batch.simulation.workload import Workload, requests_of

Builder = Callable[[float, int], Workload]
"""A workload at a load, for a seed."""
Progress = Callable[[str, float], None]
"""Hears what runs and how much of its arrivals are over, in [0, 1]."""


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """One workload at one load under one policy with one seed."""

    load: float
    seed: int
    outcome: Outcome
    summary: Json


def compare(
    fleet: Fleet,
    build: Builder,
    policies: Mapping[str, Choice],
    loads: Sequence[float],
    seeds: Sequence[int],
    config: SimulationConfig,
    progress: Progress | None = None,
    recorder: Recorder | None = None,
) -> Iterator[Run]:
    """Every run as it ends; all policies see the same arrivals, beside the same bounds.

    The first is recorded: a log is that of one scheduler. InvalidInput where nothing arrives.
    """
    for load in loads:
        for seed in seeds:
            workload = build(load, seed)
            if not workload.arrivals:
                raise InvalidInput(
                    f"Nothing arrives in {workload.name} at load {load:g} with seed {seed}; a"
                    " longer duration or a higher load brings work.",
                    param="duration",
                )
            bound = bounds(requests_of(workload, START), fleet, START, workload.duration)
            for name, policy in policies.items():
                label = f"{workload.name} at load {load:g}, {name}, seed {seed}"

                def told(
                    seconds: float, label: str = label, whole: float = workload.duration
                ) -> None:
                    if progress is not None:
                        progress(label, min(1.0, seconds / whole))

                cluster = Cluster(fleet, workload, policy, replace(config, seed=seed), recorder)
                recorder = None
                outcome = cluster.run(told)
                told_summary = {"load": load, "seed": seed, **summary(outcome, fleet, bound)}
                yield Run(load, seed, outcome, told_summary)


def rows(runs: Sequence[Run]) -> list[Json]:
    """One row per (load, policy): means over seeds, the goodput with its 95 % interval."""
    made: list[Json] = []
    keys = dict.fromkeys((run.load, run.outcome.policy) for run in runs)
    for load, policy in keys:
        own = [r.summary for r in runs if (r.load, r.outcome.policy) == (load, policy)]
        goodput, half = mean_interval([s["goodput"] for s in own])
        made.append(
            {
                "workload": own[0]["workload"],
                "load": load,
                "policy": policy,
                "goodput": round(goodput, 6),
                "goodput_ci": round(half, 6),
                "bound": _mean([s["bound"] for s in own]),
                "bound_clairvoyant": _mean([s["bound_clairvoyant"] for s in own]),
                "attainment": {
                    name: _mean([s["attainment"][name] for s in own])
                    for name in own[0]["attainment"]
                },
                "ttft_p99": _mean([s["ttft"]["p99"] for s in own]),
                "busy": _mean([s["busy"] for s in own]),
                "swapping": _mean([s["swapping"] for s in own]),
                "swaps_per_h": _mean([s["swaps_per_h"] for s in own]),
                "recomputed_tokens": _mean([s["recomputed_tokens"] for s in own]),
            }
        )
    return made


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(float(np.mean(known)), 6) if known else None
