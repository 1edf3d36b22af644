"""What is measured of an interactive request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from qlm_batch.api import watch as watch_module
from qlm_batch.api.metrics import Metrics
from qlm_batch.api.watch import Watch
from qlm_batch.store.memory import MemoryStore


class NoCalls:
    """Nobody learns from how long requests take."""

    def took(self, seconds: float) -> None:
        pass


def watched(began: float, target_s: float) -> tuple[Watch, Metrics]:
    calls: Any = NoCalls()
    metrics = Metrics(MemoryStore(lambda: 0.0))
    return Watch(metrics, calls, began, target_s), metrics


def value(metrics: Metrics, name: str) -> float:
    lines = metrics.text().decode().splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


@pytest.mark.parametrize(("target_s", "met"), [(2.0, "yes"), (0.5, "no")])
def test_an_answer_that_comes_whole_met_its_target_if_its_first_token_did(
    monkeypatch: pytest.MonkeyPatch, target_s: float, met: str
) -> None:
    monkeypatch.setattr(watch_module, "time", SimpleNamespace(perf_counter=lambda: 105.0))
    watch, metrics = watched(100.0, target_s)
    watch.told((), 4.0)
    assert value(metrics, "qlm_interactive_first_token_seconds_sum") == pytest.approx(1.0)
    assert value(metrics, f'qlm_slo_total{{met="{met}",slo_class="interactive"}}') == 1
