"""How much faster than real time the simulator is, and what a deep queue takes.

Saturated instances serve batches of a day's window; the scheduler, reaper, heartbeats and claims
run as in the service. Speeds are per second of processor time, so that a busy machine measures
itself alone; wall time is printed beside it.

    python benchmarks/simulator_speed.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import sys
import time

if __name__ == "__main__":
    # Not this folder: its queue.py would hide the standard library's.
    sys.path.pop(0)

import numpy as np
import structlog

from qlm_batch.domain.jobs import SloClass
from qlm_batch.scheduling.policies import policy
from qlm_batch.simulation.cluster import START, Cluster, SimulationConfig
from qlm_batch.simulation.fleet import Fleet, instances
from qlm_batch.simulation.workload import Arrival, WorkClass, Workload

RATE = 36.0
"""Requests per second of one instance, about."""
DAY = WorkClass("day", SloClass.BATCH, 86_400.0)


def queue(requests: int, duration: float, lines: int = 10_000) -> Workload:
    """So many requests at time 0, of ShareGPT-like lengths."""
    rng = np.random.default_rng(0)
    arrivals = tuple(
        Arrival(
            0.0,
            0,
            "mistral-7b",
            f"tenant-{n % 4}",
            np.clip(rng.lognormal(4.81, 1.18, lines), 1, 2048).astype(np.int64),
            np.clip(rng.lognormal(4.85, 1.06, lines), 1, 2048).astype(np.int64),
        )
        for n in range(-(-requests // lines))
    )
    return Workload("saturated", (DAY,), arrivals, duration, 2048)


def speed(count: int, duration: float, requests: int = 0) -> dict[str, float]:
    """Times real of `count` saturated instances, loading the queue included."""
    fleet = Fleet(instances("gpu", "a100", ["mistral-7b"], count))
    work = queue(requests or int(1.2 * RATE * count * duration), duration)
    cluster = Cluster(fleet, work, policy("edf-shed"), SimulationConfig(drain_s=0.0))
    began_wall, began = time.perf_counter(), time.process_time()
    outcome = cluster.run()
    used, wall = time.process_time() - began, time.perf_counter() - began_wall
    virtual = outcome.ended_at - START
    busy = sum(t.busy_s for t in outcome.tallies.values()) / virtual / count
    done = int(np.isfinite(outcome.requests.end).sum())
    return {
        "instances": count,
        "virtual_s": round(virtual, 1),
        "cpu_s": round(used, 2),
        "wall_s": round(wall, 2),
        "times_real": round(virtual / used, 1),
        "requests": len(outcome.requests),
        "served": done,
        "cpu_us_per_served": round(used / done * 1e6, 1),
        "busy": round(busy, 3),
    }


def main() -> int:
    """Print each case as it ends, and all of them as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    speed(1, 10.0)
    rows = []
    cases = ((10, 60.0, 0), (100, 10.0, 0)) if quick else ((10, 300.0, 0), (100, 30.0, 0))
    for count, duration, requests in (*cases, (10, 10.0, 100_000 if quick else 1_000_000)):
        rows.append(speed(count, duration, requests))
        print(rows[-1], file=sys.stderr)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    told = {
        "times_real_10": rows[0]["times_real"],
        "times_real_100": rows[1]["times_real"],
        "queued": rows[2]["requests"],
        "peak_mb": round(peak_mb),
        "rows": rows,
    }
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
