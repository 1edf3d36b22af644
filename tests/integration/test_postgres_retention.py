"""That forgetting leaves nothing in any table, and finds what is to go by indexes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from qlm_batch.domain.jobs import DeliveryAttempt
from qlm_batch.domain.snapshot import Decision, Estimate, Plan
from qlm_batch.store import retention
from qlm_batch.store.columns import METADATA
from qlm_batch.store.session import make_engine
from tests.contract.harness import LEASE, Bench, PostgresHarness

_STAYS = {"file", "instance", "leader", "attainment", "tenant"}
_ROWS = 20_000


@pytest.fixture
def harness(postgres_url: str) -> Iterator[PostgresHarness]:
    made = PostgresHarness(postgres_url)
    yield made
    made.close()


def _filled(harness: PostgresHarness) -> set[str]:
    count = "SELECT count(*) FROM "
    tables = [table.name for table in METADATA.sorted_tables]
    return {name for name in tables if harness.execute(f'{count} "{name}"').fetchone() != (0,)}  # type: ignore[arg-type]


def test_nothing_of_a_forgotten_batch_is_left_in_any_table(harness: PostgresHarness) -> None:
    bench = Bench(harness)
    batch = bench.batch(lines=8)
    bench.take()
    bench.lose()
    estimates = {batch.id: Estimate(5.0, 6.0, 0.1, "steady", 1.0)}
    plan = Plan(1.0, "qlm", (), estimates=estimates, estimator="1")
    bench.store.save_plan(bench.epoch, plan, [Decision("planned", 1.0, batch.id)])
    bench.serve()
    bench.export(batch.id)
    (item,) = bench.store.claim_outbox("a", 10, 60.0)
    bench.store.record_delivery(DeliveryAttempt(item.id, True, 200, "ok", 0.1, None))
    of_batch = {"attempt_error", "decision", "delivery", "estimate", "outbox", "result", "slice"}
    assert of_batch <= _filled(harness)
    harness.advance(LEASE)
    assert bench.store.forget_batches(LEASE - 1) == 1
    assert "forgotten_run" in _filled(harness)
    assert bench.store.forget_lines(limit=5) == 5
    assert bench.store.forget_lines(limit=5) == 3
    assert _filled(harness) <= _STAYS


def test_what_is_to_be_forgotten_is_found_without_reading_a_table_whole(
    harness: PostgresHarness,
) -> None:
    rows = f"FROM generate_series(1, {_ROWS}) n"
    fill = f"""
        INSERT INTO batch (id, tenant, endpoint, input_file_id, completion_window, window_s,
                           on_miss, state, created_at, deadline, completed_at)
        SELECT 'b' || n, 't', 'e', 'f', '1h', 1, 'expire', 'completed', n, n, n {rows};
        INSERT INTO run (batch_id, tenant, model, kind, slo_class, deadline, requests)
        SELECT 'b' || n, 't', 'm', 'generate', 'batch', n, 1 {rows};
        INSERT INTO outbox (event_id, tenant, batch_id, generation, type, channel, target,
                            created_at, state, next_attempt_at)
        SELECT 'e', 't', 'b' || n, 1, 'batch.completed', 'email', 'a', n, 'delivered', n {rows};
        INSERT INTO decision (kind, at, batch_id, detail)
        SELECT 'planned', n, 'b' || n, '{{}}' {rows};
        INSERT INTO attempt_error (run_id, generation, lo, hi, slice_id, epoch, reason, at)
        SELECT n, 1, 0, 1, n, 1, 'r', n {rows};
        INSERT INTO request (run_id, position, line, custom_id, body, prompt_tokens)
        SELECT n, 0, 1, 'c', '{{}}', 1 {rows};
        INSERT INTO result (run_id, position, generation, ok, request_id, status_code, epoch,
                            stored_at)
        SELECT n, 0, 1, true, 'r', 200, 1, n {rows};
        ANALYZE
    """
    for statement in fill.split(";"):
        harness.execute(statement)  # type: ignore[arg-type]
    given = {"rows_s": 60.0, "limit": 10, "ids": ["b1", "b2"], "run_id": 1, "first": 0}
    engine = make_engine(harness.url, pool_size=1)
    for name in ("ENDED", "REMEMBER_RUNS", "DROP_LOSSES", "DROP_DECISIONS", "DROP_BATCHES",
                 "DROP_RESULTS", "DROP_REQUESTS"):  # fmt: skip
        statement: sa.TextClause = getattr(retention, f"_{name}")
        asked = sa.text(f"EXPLAIN {statement.text}")
        used = {key: given[key] for key in asked.compile().params}
        with engine.connect() as connection:
            plan = "\n".join(connection.scalars(asked, used))
        assert "Seq Scan" not in plan, f"{name}:\n{plan}"
    engine.dispose()
