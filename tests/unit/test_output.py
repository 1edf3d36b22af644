"""What commands tell people of estimates and progress."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from qlm_cli import output
from qlm_cli.output import Json, coming, eta_text, progress_text, table_of


@pytest.mark.parametrize(
    ("p50", "p95", "told"),
    [
        (-30, -5, "any moment"),
        (-30, 20, "any moment (95 % sure: 20 s)"),
        (-0.9, 0.5, "within a second"),
        (0.2, None, "within a second"),
        (0.2, 3, "within a second (95 % sure: 3 s)"),
        (3, 5, "in about 3 s (95 % sure: 5 s)"),
        (90, 7500, "in about 1 min 30 s (95 % sure: 2 h 5 min)"),
    ],
)
def test_an_estimate_says_how_soon(p50: float, p95: float | None, told: str) -> None:
    now = 1e9
    eta = {"p50": now + p50, "p95": None if p95 is None else now + p95}
    assert coming(eta, now) == told


def test_a_table_loses_nothing_on_a_narrow_terminal() -> None:
    shown = table_of("id", "status", "deadline", "estimate")
    row = ("batch_bda60bf59725acb9ca583d84", "in_progress", "2026-11-28 11:18:09", "in about 10 s")
    shown.add_row(*row)
    console = Console(width=60, file=io.StringIO())
    with console.capture() as capture:
        console.print(shown)
    assert row[0] in capture.get()
    assert "…" not in capture.get()


def _batch(status: str, **qlm: object) -> Json:
    return {
        "id": "batch_1",
        "status": status,
        "request_counts": {"total": 3, "completed": 1, "failed": 1},
        "qlm": qlm,
    }


def test_a_tiny_batch_is_done_within_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1e9
    monkeypatch.setattr(output, "time", SimpleNamespace(time=lambda: now))
    told = progress_text(_batch("in_progress", eta={"p50": now, "p95": now}))
    assert told == "batch_1  in_progress  2/3, 1 failed  done within a second"


def test_without_an_estimate_the_reason_is_told() -> None:
    eta = {"p50": None, "p95": None}
    served_nowhere = _batch("in_progress", eta=eta, reason="no instance serves model m")
    assert eta_text(served_nowhere) == "no instance serves model m"
    assert eta_text(_batch("in_progress", eta=eta)) == "no estimate yet"
    assert eta_text(_batch("completed", eta=eta)) == ""
