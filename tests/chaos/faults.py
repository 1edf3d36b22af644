"""Breaks things as the schedule says, and measures how soon work goes on afterwards."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psycopg
import redis

from tests.chaos.batches import Load
from tests.chaos.callers import Receivers, until
from tests.chaos.schedule import PROCESSES, SCHEDULERS, Fault
from tests.chaos.site import LEASE_S, SILENT_S, TERM_S, Site
from tests.chaos.watch import Watch

RESUME_S = 10.0
"""Within which work goes on after a fault, terms of leases and of leaders aside."""
ASIDE_S = 2 * LEASE_S + TERM_S + SILENT_S
"""A lease runs out, a reaper waits a term after an outage, and a leader may have to be replaced."""
ARMED_S = 6.0
"""How long a process may live with its failpoint."""

Say = Callable[[str], None]


@dataclass
class Faults:
    """Carries faults out one after the other, from the main thread."""

    site: Site
    watch: Watch
    load: Load
    receivers: Receivers
    say: Say
    resumed: list[float] = field(default_factory=list)
    """Seconds from the end of each fault to the next stored result."""
    violations: list[str] = field(default_factory=list)
    _extra: int = 0

    def carry_out(self, fault: Fault) -> None:
        """Break, mend, and wait until work goes on."""
        self.watch.disturbed()
        method: Callable[[Fault], None] = getattr(self, "_" + fault.kind.replace("-", "_"))
        method(fault)
        self.watch.disturbed()
        resumed = self._resumes()
        told = "nothing to do" if resumed is None else f"work goes on after {resumed:.1f} s"
        self.say(f"{fault}: {told}")
        time.sleep(fault.pause_s)

    def _resumes(self) -> float | None:
        began, before = time.monotonic(), self.watch.progress
        idle_since: float | None = None
        while self.watch.progress == before:
            waited = time.monotonic() - began
            if waited > 60:
                self.violations.append(f"no work for {waited:.0f} s after a fault")
                return waited
            if self.watch.open_slices:
                idle_since = None
            else:
                idle_since = idle_since or time.monotonic()
                if time.monotonic() - idle_since > 3:
                    return None
            time.sleep(0.02)
        took = time.monotonic() - began
        self.resumed.append(took)
        if took > RESUME_S + ASIDE_S:
            self.violations.append(f"work went on only {took:.1f} s after a fault")
        return took

    # Processes

    def _kill(self, fault: Fault) -> None:
        for name in fault.targets:
            self.site.signal(name, signal.SIGKILL)

    _storm = _kill

    def _stop(self, fault: Fault) -> None:
        (name,) = fault.targets
        self.site.signal(name, signal.SIGSTOP)
        time.sleep(fault.seconds)
        self.site.signal(name, signal.SIGCONT)

    def _term(self, fault: Fault) -> None:
        self.site.signal(fault.targets[0], signal.SIGTERM)

    def _quit(self, fault: Fault) -> None:
        self.site.signal(fault.targets[0], signal.SIGQUIT)

    def _clock(self, fault: Fault) -> None:
        self.site.signal(fault.targets[0], signal.SIGHUP)

    def _engine_hangs(self, fault: Fault) -> None:
        self._dies_of(fault, signal.SIGUSR1, 30)

    def _engine_dies(self, fault: Fault) -> None:
        self._dies_of(fault, signal.SIGUSR2, 15)

    def _dies_of(self, fault: Fault, number: signal.Signals, within_s: float) -> None:
        (name,) = fault.targets
        pid = self.site.pid(name)
        self.site.signal(name, number)
        if not until(lambda: self.site.pid(name) != pid, within_s):
            self.violations.append(f"{name} lives on with a broken engine: {fault}")

    def _failpoint(self, fault: Fault) -> None:
        (name,) = fault.targets
        member = self.site.members[name]
        pid, member.armed = self.site.pid(name), fault.detail
        self.site.signal(name, signal.SIGKILL)
        until(lambda: self.site.pid(name) not in (None, pid), 10)
        armed = self.site.pid(name)
        if not until(lambda: self.site.pid(name) != armed, ARMED_S):
            # A point nobody came to, or that does not kill.
            self.site.signal(name, signal.SIGKILL)

    # Leaders

    def _leader(self) -> str | None:
        with contextlib.suppress(psycopg.Error), self.site.connect() as connection:
            row = connection.execute("SELECT holder FROM leader").fetchone()
            found = re.search(r"-(\d+)-[0-9a-f]+$", str(row[0])) if row else None
            for name in SCHEDULERS:
                if found and self.site.pid(name) == int(found[1]):
                    return name
        return None

    def _leader_killed(self, fault: Fault) -> None:
        if (name := self._leader()) is not None:
            self.site.signal(name, signal.SIGKILL)

    def _leader_stopped(self, fault: Fault) -> None:
        if (name := self._leader()) is not None:
            self._stop(Fault("stop", (name,), fault.seconds))

    # Servers

    def _postgres_crash(self, fault: Fault) -> None:
        self.site.crash_postgres()
        time.sleep(fault.seconds)
        self.site.start_postgres()

    def _postgres_backend(self, fault: Fault) -> None:
        """Kill one of its processes: the server ends all others and recovers by itself."""
        with self.site.connect() as connection:
            row = connection.execute(
                "SELECT pid FROM pg_stat_activity WHERE application_name = 'qlm-batch' LIMIT 1"
            ).fetchone()
        if row is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(str(row[0])), signal.SIGKILL)
                self.site.database_crashes += 1
        # It is back once it can be connected to.
        self.site.connect().close()

    def _postgres_immediate(self, fault: Fault) -> None:
        self.site.postgres.process.signal(signal.SIGQUIT)
        self.site.postgres.process.wait(20)
        self.site.database_crashes += 1
        time.sleep(fault.seconds)
        self.site.start_postgres()

    def _postgres_outage(self, fault: Fault) -> None:
        self.site.postgres.process.signal(signal.SIGINT)
        self.site.postgres.process.wait(20)
        time.sleep(fault.seconds)
        self.site.start_postgres()

    def _postgres_cut(self, fault: Fault) -> None:
        with self.site.connect() as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'qlm-batch'"
            )

    def _redis_kill(self, fault: Fault) -> None:
        self.site.crash_valkey(forget=False)
        time.sleep(fault.seconds)
        self.site.valkey.start()

    def _redis_empty(self, fault: Fault) -> None:
        self.site.crash_valkey(forget=True)
        time.sleep(fault.seconds)
        self.site.valkey.start()

    def _redis_flush(self, fault: Fault) -> None:
        with contextlib.suppress(redis.RedisError), self.site.redis() as client:
            client.flushall()

    def _both(self, fault: Fault) -> None:
        self.site.crash_valkey(forget=True)
        self.site.crash_postgres()
        time.sleep(fault.seconds)
        self.site.start_postgres()
        self.site.valkey.start()

    # Disks, receivers, comings and goings

    def _full_blobs(self, fault: Fault) -> None:
        if "blobs" not in self.site.disks:
            failpoint = Fault("failpoint", ("files",), detail="blob.write=full%0.5")
            return self._failpoint(failpoint)
        self._full("blobs", fault.seconds)
        return None

    def _full_postgres(self, fault: Fault) -> None:
        if "postgres" in self.site.disks:
            self._full("postgres", fault.seconds)
            if not self.site.postgres.process.alive():
                # Without room for its log it gives up, as it should.
                self.site.database_crashes += 1
                self.site.start_postgres()

    def _full(self, disk: str, seconds: float) -> None:
        self.site.resize_disk(disk, full=True)
        time.sleep(seconds)
        self.site.resize_disk(disk, full=False)

    def _receiver_dead(self, fault: Fault) -> None:
        self.receivers.dead = True
        time.sleep(fault.seconds)
        self.receivers.dead = False

    def _join_and_leave(self, fault: Fault) -> None:
        self._extra += 1
        name = f"gpu-extra-{self._extra}"
        self.site.add_worker(name)
        time.sleep(fault.seconds)
        self.site.end(name, roughly=self._extra % 2 == 0)

    def _upgrade(self, fault: Fault) -> None:
        """What a later version would add, while this one works; then every process anew."""
        column = f"chaos_{int(time.monotonic() * 1000)}"
        with self.site.connect() as connection:
            connection.execute(f"ALTER TABLE batch ADD COLUMN {column} text")
            connection.execute(f"ALTER TABLE slice ADD COLUMN {column} integer DEFAULT 7")
            connection.execute("CREATE INDEX CONCURRENTLY ON request (line)")
        for name in PROCESSES:
            pid = self.site.pid(name)
            self.site.signal(name, signal.SIGTERM)
            until(lambda name=name, pid=pid: self.site.pid(name) not in (None, pid), 40)

    def _poison(self, fault: Fault) -> None:
        self.load.poison()


def complain(text: str) -> None:
    """Tell whoever watches; the last line of the output is for machines."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
