"""Failpoints: nothing without the variable, and exactly what it says with it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time

import pytest

from qlm_batch import failpoints
from qlm_batch.domain.errors import ConfigurationError, Unavailable
from qlm_batch.failpoints import EXIT_STATUS, failpoint, parse


@pytest.fixture
def arm(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(failpoints, "_armed", {})
    return monkeypatch


def armed(arm: pytest.MonkeyPatch, text: str) -> None:
    arm.setattr(failpoints, "_armed", parse(text))


def test_nothing_happens_at_a_point_that_is_not_armed(arm: pytest.MonkeyPatch) -> None:
    failpoint("flush", "after_commit")
    armed(arm, "flush.before_commit=raise")
    failpoint("flush", "after_commit")


def test_it_raises_what_a_database_or_a_full_disk_would(arm: pytest.MonkeyPatch) -> None:
    armed(arm, "flush.before_commit=raise; blob.write=full")
    with pytest.raises(Unavailable):
        failpoint("flush", "before_commit")
    with pytest.raises(OSError, match="No space") as full:
        failpoint("blob.write")
    assert full.value.errno == errno.ENOSPC


def test_it_acts_at_the_hit_that_is_named_and_at_no_other(arm: pytest.MonkeyPatch) -> None:
    armed(arm, "a=raise@3")
    outcomes = []
    for _ in range(5):
        try:
            failpoint("a")
            outcomes.append(True)
        except Unavailable:
            outcomes.append(False)
    assert outcomes == [True, True, False, True, True]


def test_it_acts_with_the_chance_that_is_named(arm: pytest.MonkeyPatch) -> None:
    armed(arm, "a=raise%0.5")
    raised = 0
    for _ in range(400):
        try:
            failpoint("a")
        except Unavailable:
            raised += 1
    assert 100 < raised < 300


def test_it_sleeps(arm: pytest.MonkeyPatch) -> None:
    armed(arm, "a=sleep:0.05@1")
    began = time.monotonic()
    failpoint("a")
    assert time.monotonic() - began >= 0.05


def test_a_process_that_is_told_to_exit_does_so_at_once() -> None:
    code = (
        "from qlm_batch.failpoints import failpoint\n"
        "try:\n    failpoint('a', 'after_commit')\nfinally:\n    print('cleaned up')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "QLM_FAILPOINTS": "a.after_commit=exit@1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (EXIT_STATUS, "")


@pytest.mark.parametrize("text", ["flush", "flush=burn", "a=exit@0", "a=raise%7", "a=sleep"])
def test_what_cannot_be_read_is_named(text: str) -> None:
    with pytest.raises(ConfigurationError, match="QLM_FAILPOINTS"):
        parse(text)
