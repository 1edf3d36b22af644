"""What `qlm top` shows of the fleet: labels and numbers that explain themselves."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from qlm_cli.output import Json
from qlm_cli.top import screen

AT = 1_800_000_000
INTERACTIVE: Json = {"window_s": 300.0, "requests": 0}
MODEL: Json = {"name": "m", "residency": "awake", "wake_s": None, "swaps": 0, "parent": None}


def instance(**changes: object) -> Json:
    own: Json = {
        "name": "gpu-0",
        "state": "ready",
        "models": [MODEL],
        "batch_running": 5,
        "batch_cap": 6,
        "interactive_running": 2,
        "kv_usage": 0.25,
        "tokens_per_s": 55.0,
        "evictions": 4,
        "recomputed_tokens": 90,
        "groups": 0,
        "queue": [],
    }
    return own | changes


def batch(*, deadline: int = AT + 600, **changes: object) -> Json:
    own: Json = {
        "id": "batch_1",
        "tenant": "acme",
        "status": "in_progress",
        "done": 1,
        "total": 3,
        "deadline": deadline,
        "eta": {"p50": AT + 3, "p95": AT + 8},
        "miss_probability": 0.02,
    }
    return own | changes


def seen(**changes: object) -> str:
    fleet: Json = {
        "at": AT,
        "queued_requests": 2,
        "instances": [instance()],
        "batches": [],
        "interactive": INTERACTIVE,
    }
    console = Console(file=io.StringIO(), width=200)
    console.print(screen(fleet | changes))
    printed = console.file
    assert isinstance(printed, io.StringIO)
    return printed.getvalue()


def test_the_counts_of_an_instance_are_named() -> None:
    text = seen()
    for label in ("batch requests", "interactive", "KV used", "evictions", "tokens recomputed"):
        assert label in text


@pytest.mark.parametrize(
    ("swaps", "told"), [(0, "m (awake)"), (1, "awake, swapped in once"), (3, "swapped in 3 times")]
)
def test_how_often_a_model_was_swapped_in_is_told(swaps: int, told: str) -> None:
    assert told in seen(instances=[instance(models=[MODEL | {"swaps": swaps}])])


def test_one_of_a_thing_is_told_in_the_singular() -> None:
    assert "1 batch request waiting or running" in seen(queued_requests=1)
    group = {"group": "1.1.0", "slices": 1, "reason": "next on gpu-0"}
    assert "and 1 more group " in seen(instances=[instance(groups=6, queue=[group] * 5)])


def test_a_batch_is_told_when_it_is_expected_and_how_likely_it_is_late() -> None:
    text = seen(batches=[batch()])
    assert "1/3" in text and "in 10 min" in text and "2 % likely" in text
    assert "in about 3 s (95 % sure: 8 s)" in text


def test_a_deadline_in_the_past_has_passed() -> None:
    assert "passed 1 min 30 s ago" in seen(batches=[batch(deadline=AT - 90)])
