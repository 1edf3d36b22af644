"""What goes into an engine, and that all of it comes out again."""

from __future__ import annotations

from qlm_batch.domain.engine import EngineInfo
from qlm_batch.domain.errors import EngineDead
from qlm_batch.domain.jobs import EngineKind, ResultRow
from qlm_workers.feeder import Feeder
from qlm_workers.hosts import Host
from qlm_workers.leases import Lease
from qlm_workers.link import Link
from qlm_workers.meter import Meter
from tests.unit.runner_rig import until
from tests.unit.worker_fakes import FakeEngine, FakeStore, make_slice


def unexpected(*_: object) -> None:
    raise AssertionError("nothing fails here")


class Rig:
    """A feeder over one engine."""

    def __init__(self, slots: int = 8) -> None:
        self.engine = FakeEngine(slots=slots)
        self.host = Host("m", EngineKind.GENERATE, self.engine, Meter("gpu-0", "cpu", "m"))
        self.host.started(EngineInfo("m", EngineKind.GENERATE, 2048, slots, 4096), 0.0)
        self.rows: list[ResultRow] = []
        died: list[EngineDead] = []
        self.feeder = Feeder(
            Link(FakeStore()),
            lambda _, row: self.rows.append(row),
            lambda _, death: died.append(death),
            unexpected,
        )

    def hold(self, slice_id: int, size: int = 4) -> Lease:
        """Claim a slice."""
        lease = Lease(make_slice(slice_id, size), 5, 0.0)
        self.host.enqueue(lease)
        return lease


async def test_requests_stopped_before_they_began_give_their_places_back() -> None:
    rig = Rig()
    lease = rig.hold(1)
    rig.feeder.feed(rig.host)
    assert rig.host.inside == 4
    lease.cancel()
    await until(lambda: not lease.tasks)
    assert rig.host.inside == 0
    assert not rig.engine.requests


async def test_their_places_go_to_others_that_wait() -> None:
    rig = Rig(slots=1)
    first, second = rig.hold(1), rig.hold(2)
    rig.feeder.feed(rig.host)
    first.ended = True
    first.cancel()
    await until(lambda: len(rig.rows) == len(second.slice.requests))
    assert rig.host.inside == 0
