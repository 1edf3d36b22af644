"""What a run is worth: attainment, goodput, latency, utilisation, swaps; in plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from qlm_batch.simulation.bounds import Bounds, weights
from qlm_batch.simulation.cluster import START, Outcome
from qlm_batch.simulation.fleet import Fleet

Json = dict[str, Any]


def summary(outcome: Outcome, fleet: Fleet, bound: Bounds | None = None) -> Json:
    """Everything measured in one run, without real time: equal runs give equal summaries.

    Fractions in [0, 1], times in seconds; null where nothing was measured.
    """
    requests = outcome.requests
    on_time, weight = requests.on_time, weights(requests, fleet)
    total = float(weight.sum())
    span = max(outcome.ended_at - START, 1e-9)
    tallies = outcome.tallies.values()
    first_wait = requests.first - requests.arrival
    whole = requests.end - requests.arrival
    late = np.where(requests.interactive, requests.first, requests.end) - requests.due
    machines = len(outcome.tallies)
    return {
        "workload": outcome.workload.name,
        "policy": outcome.policy,
        "requests": len(requests),
        "finished": int(np.isfinite(requests.end).sum()),
        "unfinished": outcome.unfinished,
        "goodput": _round(float(weight[on_time].sum()) / total if total else None),
        "bound": _round(None if bound is None else bound.blind),
        "bound_clairvoyant": _round(None if bound is None else bound.clairvoyant),
        "attainment": {
            work_class.name: _share(on_time, requests.work_class == number)
            for number, work_class in enumerate(requests.classes)
        },
        "interactive": _share(on_time, requests.interactive),
        "batch": _share(on_time, ~requests.interactive),
        "tenants": {
            tenant: _share(on_time, requests.tenant == number)
            for number, tenant in enumerate(requests.tenants)
        },
        "ttft": _quantiles(first_wait[requests.interactive]),
        "latency": _quantiles(whole[~requests.interactive]),
        "tardiness_mean": _mean(np.maximum(late, 0.0)),
        "ended_at": _round(span),
        "output_tokens_per_s": _round(sum(t.generated for t in tallies) / span),
        "busy": _round(sum(t.busy_s for t in tallies) / span / machines),
        "swapping": _round(sum(t.swap_s for t in tallies) / span / machines),
        "swaps": sum(t.swaps for t in tallies),
        "swaps_per_h": _round(sum(t.swaps for t in tallies) / span * 3600.0),
        "preemptions": sum(t.preemptions for t in tallies),
        "recomputed_tokens": sum(t.recomputed for t in tallies),
        "plans": len(outcome.planning_s),
    }


def timings(outcome: Outcome) -> Json:
    """Real time: planning, and how much faster than real the run was."""
    plans = np.array(outcome.planning_s or [0.0]) * 1e3
    return {
        "plan_ms_p50": round(float(np.quantile(plans, 0.5)), 2),
        "plan_ms_p99": round(float(np.quantile(plans, 0.99)), 2),
        "wall_s": round(outcome.wall_s, 2),
        "times_real": round((outcome.ended_at - START) / max(outcome.wall_s, 1e-9), 1),
    }


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval over seeds; 0 wide for a single value."""
    if len(values) < 2:
        return float(np.mean(values)), 0.0
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return float(np.mean(values)), float(stdtrit(len(values) - 1, 0.975)) * error


def _round(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else round(value, 6)


def _share(on_time: NDArray[np.bool_], own: NDArray[np.bool_]) -> float | None:
    return _round(float(on_time[own].mean())) if own.any() else None


def _mean(values: NDArray[np.float64]) -> float | None:
    known = values[np.isfinite(values)]
    return _round(float(known.mean())) if len(known) else None


def _quantiles(values: NDArray[np.float64]) -> Json:
    known = values[np.isfinite(values)]
    if not len(known):
        return {"p50": None, "p95": None, "p99": None}
    return {f"p{level}": _round(float(np.quantile(known, level / 100))) for level in (50, 95, 99)}
