"""What would become of work not submitted yet, and how promises are scored."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from qlm_batch.domain.jobs import Batch, BatchSpec, BatchState, Promise
from qlm_batch.domain.snapshot import Snapshot
from qlm_batch.scheduling.admission import Admission, Admissions, Verdict, Work
from qlm_batch.scheduling.policies import policy
from qlm_batch.scheduling.receipts import Receipt, receipt, reliability
from tests.unit.planning_cases import instance, run_view, snapshot

ASK = Admissions(policy("qlm"), 50)
IDLE = snapshot(instances=[instance("i")])


def work(requests: int, model: str = "m") -> list[Work]:
    return [Work(model, requests, requests * 100, requests * 128)]


def asked(requests: int, window_s: float, now: Snapshot = IDLE, tenant: str = "t") -> Admission:
    return ASK.foresee(now, work(requests), tenant, window_s)


def test_little_work_with_much_time_is_accepted() -> None:
    found = asked(64, 86_400.0)
    assert found.verdict is Verdict.ACCEPT
    assert found.estimate.p50 is not None and found.estimate.p95 is not None
    assert 0.0 < found.estimate.p50 < found.estimate.p95 < found.deadline


def test_what_cannot_be_done_in_time_is_refused_with_a_window_that_holds() -> None:
    found = asked(64_000, 10.0)
    assert found.verdict is Verdict.REFUSE
    assert found.earliest_window_s is not None
    assert asked(64_000, found.earliest_window_s).verdict is Verdict.ACCEPT
    assert asked(64_000, 0.5 * found.earliest_window_s).verdict is not Verdict.ACCEPT


def test_no_window_is_told_that_may_not_be_asked_for() -> None:
    found = asked(100_000_000, 30 * 86_400.0)
    assert found.verdict is Verdict.REFUSE
    assert found.earliest_window_s is None


def test_a_deadline_at_the_median_is_worth_a_warning() -> None:
    p50 = asked(6400, 86_400.0).estimate.p50
    assert p50 is not None
    assert asked(6400, 1.05 * p50).verdict is Verdict.WARN


def test_a_model_nobody_serves_is_refused_whatever_the_window() -> None:
    found = ASK.foresee(IDLE, work(1, "absent"), "t", 86_400.0)
    assert (found.verdict, found.earliest_window_s) == (Verdict.REFUSE, None)
    assert "absent" in found.estimate.reason


def test_work_queued_already_makes_one_wait() -> None:
    busy = snapshot(runs=[run_view(1, 100, deadline=3600.0)], instances=[instance("i")])
    alone, behind = asked(64, 86_400.0).estimate.p50, asked(64, 86_400.0, busy).estimate.p50
    assert alone is not None and behind is not None
    assert behind > 2.0 * alone


def test_work_that_would_make_others_late_is_worth_a_warning() -> None:
    p50 = asked(12_800, 86_400.0).estimate.p50
    assert p50 is not None
    waiting = run_view(1, 200, deadline=1.8 * p50, batch_id="theirs")
    busy = snapshot(runs=[waiting], instances=[instance("i")])
    found = asked(12_800, 1.6 * p50, busy)
    assert found.others == ("theirs",) or found.verdict is Verdict.REFUSE


def test_asking_changes_nothing() -> None:
    before = replace(IDLE)
    assert asked(640, 600.0) == asked(640, 600.0)
    assert before == IDLE


def ended(state: BatchState, **changes: float | int) -> Batch:
    spec = BatchSpec("t", "/v1/chat/completions", "file", "1h", 3600.0)
    promise = Promise(200.0, 300.0, "", "flow-1", 100.0)
    made = Batch("b", spec, state, 1, 90.0, 3690.0, promise=promise)
    return replace(made, **changes)


def test_a_receipt_counts_from_the_promise() -> None:
    assert receipt(ended(BatchState.COMPLETED, completed_at=250.0)) == Receipt(
        "b", 100.0, 200.0, 150.0
    )


def test_what_expired_was_not_done_by_any_bound() -> None:
    found = receipt(ended(BatchState.EXPIRED, expired_at=3690.0))
    assert found is not None and math.isinf(found.actual_s) and found.level == 1.0


@pytest.mark.parametrize(
    "batch",
    [
        ended(BatchState.CANCELLED, cancelled_at=150.0),
        ended(BatchState.IN_PROGRESS),
        ended(BatchState.COMPLETED, completed_at=150.0, generation=2),
    ],
)
def test_what_was_cancelled_still_runs_or_ran_again_is_not_scored(batch: Batch) -> None:
    assert receipt(batch) is None


def test_honest_promises_are_reliable_and_boastful_ones_are_not() -> None:
    spread = math.log(2.0) / 1.645
    actual = 100.0 * np.exp(spread * np.random.default_rng(1).standard_normal(4000))
    honest = reliability(Receipt("b", 100.0, 200.0, float(s)) for s in actual)
    boastful = reliability(Receipt("b", 50.0, 100.0, float(s)) for s in actual)
    assert honest.by_p95 == pytest.approx(0.95, abs=0.01)
    assert honest.error < 0.03
    assert boastful.by_p95 == pytest.approx(0.5, abs=0.03)
    assert boastful.error > 0.3


def test_the_quantiles_themselves_are_on_their_levels() -> None:
    assert Receipt("b", 100.0, 200.0, 100.0).level == pytest.approx(0.5)
    assert Receipt("b", 100.0, 200.0, 200.0).level == pytest.approx(0.95)
