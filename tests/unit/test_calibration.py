"""Promises are kept as often as they say: also under drift, and when outcomes come late."""

from __future__ import annotations

import heapq
import math
from dataclasses import replace

import numpy as np
import pytest

from qlm_batch.scheduling.calibration import LEAST_WIDTH, WIDEST, Conformal, Quantiles, score
from qlm_batch.scheduling.profile import Knowledge

ERROR = 0.15


def told(state: Conformal, ratio: float) -> tuple[bool, bool]:
    """Whether what should take 10 s and takes so many times that was done by p50 and by p95."""
    found = state.quantiles().foreseen(10.0, ERROR)
    assert 0.0 < found.p50_s <= found.p95_s < math.inf
    return 10.0 * ratio <= found.p50_s, 10.0 * ratio <= found.p95_s


def after(state: Conformal, ratio: float) -> Conformal:
    return state.after(score(10.0, ERROR, 10.0 * ratio))


def test_half_is_done_by_the_median_and_nineteen_of_twenty_by_the_bound_under_drift() -> None:
    rng = np.random.default_rng(5)
    state, kept = Conformal(), []
    for n in range(4000):
        ratio = float(rng.lognormal(0.8 * np.sin(n / 150), 0.3))
        kept.append(told(state, ratio))
        state = after(state, ratio)
    by50, by95 = np.mean(kept, axis=0)
    assert 0.45 <= by50 <= 0.55
    assert 0.93 <= by95 <= 0.97


def adversary(kind: str, bound: float, n: int) -> float:
    """The next ratio of actual to predicted, chosen by one who knows the bound."""
    match kind:
        case "steps":
            return 0.5 if (n // 250) % 2 else 3.0
        case "growing":
            return min(15.0, float(1.002**n))
        case "bursts":
            return 10.0 if n % 400 < 12 else 1.0
        case _:
            # Just outside whenever the bound has become tight, just inside otherwise.
            return 1.05 * bound if bound < 4.0 and n % 16 == 0 else 0.95 * bound


@pytest.mark.parametrize("kind", ["steps", "growing", "bursts", "just outside"])
def test_the_bound_holds_against_an_adversary(kind: str) -> None:
    state, kept = Conformal(), []
    for n in range(3000):
        ratio = adversary(kind, state.quantiles().foreseen(1.0, ERROR).p95_s, n)
        kept.append(told(state, ratio)[1])
        state = after(state, ratio)
    assert np.mean(kept) >= 0.93
    assert min(np.mean(part) for part in np.array_split(kept, 5)) >= 0.88


def test_a_bound_is_never_infinite() -> None:
    state = Conformal()
    for _ in range(500):
        state = state.after(score(1.0, ERROR, 1e9))
    assert state.quantiles().foreseen(10.0, ERROR).p95_s <= 10.0 * WIDEST * (1 + 1e-9)


def kept_late(seed: int, *, overdue: bool) -> tuple[float, float, float]:
    """Promises made every second for what takes a minute or so, half as long again in the end.

    The outcome is known when it is over. The shares done by p50 and p95, and median p95 / actual.
    """
    rng = np.random.default_rng(seed)
    state, running, kept = Conformal(), [], []
    for now in range(1500):
        while running and running[0][0] <= now:
            end, made, found = heapq.heappop(running)
            state = state.after(score(found.mean_s, found.error, end - made))
        late = [
            score(found.mean_s, found.error, now - made)
            for _, made, found in running
            if overdue and now - made > found.p95_s
        ]
        found = replace(state, overdue=tuple(late)).quantiles().widened().foreseen(60.0, ERROR)
        drift = 1.0 + 0.5 * min(1.0, max(0.0, (now - 400) / 400))
        actual = 60.0 * drift * float(rng.lognormal(0.0, ERROR))
        kept.append((actual <= found.p50_s, actual <= found.p95_s, found.p95_s / actual))
        heapq.heappush(running, (now + actual, now, found))
    by50, by95, _ = np.mean(kept, axis=0)
    return float(by50), float(by95), float(np.median([own[2] for own in kept]))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_promises_hold_when_outcomes_come_late_and_things_get_slower(seed: int) -> None:
    by50, by95, wide = kept_late(seed, overdue=True)
    assert 0.3 <= by50 <= 0.6
    assert 0.92 <= by95 <= 0.98
    assert wide <= 1.6
    assert kept_late(seed, overdue=False)[1] < by95


def test_before_anything_was_seen_the_prior_is_wider_than_the_error() -> None:
    fresh = Conformal().quantiles()
    assert abs(fresh.middle) < 0.1
    assert fresh.high > 1.7
    seen = Conformal()
    for _ in range(100):
        seen = seen.after(1.0)
    assert seen.quantiles().middle == 1.0


def test_however_well_it_did_some_of_the_error_is_left_to_the_estimator() -> None:
    assert Quantiles(0.0, 0.1).widened().high == pytest.approx(LEAST_WIDTH * 1.645, rel=1e-3)
    assert Quantiles(0.0, 9.0).widened().high == 9.0


def test_the_chance_of_a_miss_agrees_with_the_quantiles() -> None:
    found = Conformal().quantiles().foreseen(60.0, ERROR)
    assert found.beyond(found.p50_s) == pytest.approx(0.5)
    assert found.beyond(found.p95_s) == pytest.approx(0.05)
    assert found.beyond(0.0) == 1.0


def test_what_was_learned_of_a_model_is_its_own_and_survives_the_store() -> None:
    known = Knowledge().ended([("m", 2.0)] * 30, {"n": (9.0,) * 9})
    assert known.quantiles("m").middle == 2.0
    assert known.quantiles("x") == Knowledge().quantiles("x")
    assert known.quantiles("n").high > known.quantiles("x").high
    assert Knowledge.of(known.profiles()).calibrations == known.calibrations
