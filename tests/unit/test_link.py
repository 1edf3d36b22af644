"""A worker's idea of the database's time."""

from __future__ import annotations

import time

import pytest

from qlm_workers import link as link_module
from qlm_workers.link import Link
from tests.unit.worker_fakes import NOW, FakeStore


async def test_a_slow_answer_does_not_set_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    store = FakeStore()
    link = Link(store)
    await link.check_clock()
    assert link.now() == pytest.approx(NOW, abs=60)
    monkeypatch.setattr(link_module, "CLOCK_CHECK_S", 0.0)
    monkeypatch.setattr(link_module, "SLOW_S", 0.0)
    monkeypatch.setattr(store, "now", lambda: NOW + 3600)
    await link.check_clock()
    assert link.now() == pytest.approx(NOW, abs=60)
    link.close()


async def test_the_first_answer_sets_it_however_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "SLOW_S", 0.0)
    link = Link(FakeStore())
    assert link.now() == pytest.approx(time.monotonic(), abs=60)
    await link.check_clock()
    assert link.now() == pytest.approx(NOW, abs=60)
    link.close()
