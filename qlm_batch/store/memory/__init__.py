"""A store without a database: for tests of the service, and for the simulator's virtual clock.

It keeps the contract of the PostgreSQL store and forgets everything when it goes.
"""

from __future__ import annotations

from collections.abc import Callable

from qlm_batch.store.memory.batches import MemoryBatches
from qlm_batch.store.memory.export import MemoryExport
from qlm_batch.store.memory.files import MemoryFiles
from qlm_batch.store.memory.fleet import MemoryInstances
from qlm_batch.store.memory.intake import MemoryIntake
from qlm_batch.store.memory.interactive import MemoryInteractive
from qlm_batch.store.memory.keys import MemoryKeys
from qlm_batch.store.memory.leadership import MemoryLeadership
from qlm_batch.store.memory.ledger import MemoryLedger
from qlm_batch.store.memory.outbox import MemoryOutbox
from qlm_batch.store.memory.planning import MemoryPlanning
from qlm_batch.store.memory.retention import MemoryRetention
from qlm_batch.store.memory.state import State


class MemoryStore(
    MemoryFiles,
    MemoryBatches,
    MemoryIntake,
    MemoryExport,
    MemoryLedger,
    MemoryLeadership,
    MemoryPlanning,
    MemoryInstances,
    MemoryInteractive,
    MemoryOutbox,
    MemoryRetention,
    MemoryKeys,
):
    """The Store port in memory, safe to share between threads.

    `now` is its clock, in seconds; an instance silent for `silent_s` appears as lost.
    """

    def __init__(self, now: Callable[[], float], *, silent_s: float = 15.0) -> None:
        self.state = State(now, silent_s)

    def ping(self) -> None:
        """Always reachable."""

    def now(self) -> float:
        """The injected clock."""
        return self.state.clock()

    def close(self) -> None:
        """Nothing to give back."""
