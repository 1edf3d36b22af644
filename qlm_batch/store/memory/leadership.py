"""Who leads the in-memory store, and the fence every plan passes."""

from __future__ import annotations

from qlm_batch.domain.errors import NotLeader
from qlm_batch.store.memory.state import Facet, State, locked


def check_leader(state: State, epoch: int) -> None:
    """Raise NotLeader unless `epoch` is the leader's now."""
    leader = state.leader
    if leader.holder is None or leader.epoch != epoch:
        raise NotLeader(f"Epoch {epoch} does not lead (any more); the write changed nothing.")


class MemoryLeadership(Facet):
    """Leadership in memory."""

    @locked
    def lead(self, holder: str, term_s: float) -> int | None:
        """Take or renew leadership."""
        leader, now = self.state.leader, self.state.clock()
        leads = leader.holder is not None and leader.until > now
        if leads and leader.holder != holder:
            return None
        if not leads:
            leader.holder = holder
            leader.epoch += 1
        leader.until = now + term_s
        return leader.epoch

    @locked
    def resign(self, holder: str) -> None:
        """Give leadership up so that a standby takes over at once."""
        if self.state.leader.holder == holder:
            self.state.leader.holder = None
