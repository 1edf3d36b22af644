"""The sweep over interactive requests."""

from __future__ import annotations

from qlm_batch.control.interactive_sweep import InteractiveSweep, InteractiveSweepConfig
from qlm_batch.domain.interactive import InteractiveMark, InteractiveState, NewInteractive
from qlm_batch.domain.jobs import CHAT
from qlm_batch.settings import Settings
from qlm_batch.store.memory import MemoryStore


def test_lost_requests_end_and_old_ones_are_forgotten() -> None:
    time = [1000.0]
    store = MemoryStore(lambda: time[0])
    for name in ("lost", "old"):
        store.add_interactive(
            NewInteractive(name, "acme", CHAT, "m", "{}", False, 1.0, "gpu-0", "boot")
        )
    store.mark_interactive([InteractiveMark("old", 1, InteractiveState.DONE, 200, "{}")])
    config = InteractiveSweepConfig.of(Settings(interactive_bodies_s=30.0))
    sweep = InteractiveSweep(store, config)
    assert not sweep.run_once()
    time[0] += config.grace_s + 1
    done = sweep.run_once()
    assert (done.failed, done.forgotten) == (1, 1)
    assert store.interactive("acme", "lost").state is InteractiveState.FAILED
    assert store.interactive("acme", "old").body is None
    assert not sweep.run_once()
