"""Instances of the in-memory store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qlm_batch.domain.records import Heartbeat
from qlm_batch.domain.snapshot import InstanceState, InstanceView
from qlm_batch.store.memory.planning import instance_views
from qlm_batch.store.memory.state import Facet, InstanceData, locked
from qlm_batch.store.memory.work import lose, requeue


class MemoryInstances(Facet):
    """InstanceStore in memory."""

    @locked
    def heartbeat(self, beat: Heartbeat) -> bool:
        """Report life."""
        known = self.state.instances.get(beat.name)
        past: set[str] = set()
        if known is not None:
            if beat.boot_id in known.past_boots:
                return False
            past = known.past_boots
            if known.beat.boot_id != beat.boot_id:
                past = past | {known.beat.boot_id}
                self._take_back(beat.name)
        self.state.observations.extend(beat.observations)
        self.state.instances[beat.name] = InstanceData(beat, self.state.clock(), past)
        return True

    def _take_back(self, name: str) -> None:
        self._requeue_assigned(name)
        lose(self.state, list(self.state.leased[name].values()))

    def _requeue_assigned(self, name: str) -> None:
        for part in list(self.state.assigned[name].values()):
            requeue(self.state, part)

    @locked
    def retire(self, name: str, boot_id: str) -> None:
        """Leave in good order: nothing may be held any more."""
        known = self.state.instances.get(name)
        if known is None or known.beat.boot_id != boot_id:
            return
        known.retired = True
        known.past_boots.add(boot_id)
        self._requeue_assigned(name)
        for part in list(self.state.leased[name].values()):
            requeue(self.state, part)

    @locked
    def died(self, name: str, boot_id: str) -> None:
        """Take a boot whose process is dead for lost at once."""
        known = self.state.instances.get(name)
        if known is None or known.beat.boot_id != boot_id or known.gone:
            return
        known.beat = replace(known.beat, state=InstanceState.LOST)
        known.past_boots.add(boot_id)
        self._take_back(name)

    @locked
    def instances(self) -> Sequence[InstanceView]:
        """All instances seen lately, lost ones included."""
        return instance_views(self.state)

    @locked
    def served_lately(self, model: str, within_s: float) -> bool:
        """Whether an instance with `model` was seen within `within_s`, though it may have left."""
        since = self.state.clock() - within_s
        return any(
            known.at > since and any(hosted.name == model for hosted in known.beat.models)
            for known in self.state.instances.values()
        )
