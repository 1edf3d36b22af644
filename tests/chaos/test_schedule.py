"""The schedule of faults."""

from __future__ import annotations

from qlm_batch.failpoints import parse
from tests.chaos.faults import Faults
from tests.chaos.schedule import FAILPOINTS, KINDS, plan


def test_a_seed_gives_one_schedule_and_another_seed_another() -> None:
    assert plan(7, 200) == plan(7, 200)
    assert plan(7, 50) != plan(8, 50)


def test_every_kind_of_fault_comes_in_the_first_deck() -> None:
    assert {fault.kind for fault in plan(3, len(KINDS))} == set(KINDS)


def test_the_driver_can_carry_out_every_kind() -> None:
    assert all(hasattr(Faults, "_" + kind.replace("-", "_")) for kind in KINDS)


def test_every_failpoint_of_the_schedule_can_be_armed() -> None:
    for points in FAILPOINTS.values():
        for template, _ in points:
            assert len(parse(template.format(n=5, few=2))) == 1
