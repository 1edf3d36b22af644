"""Looks at the database from outside, many times a second, while everything is being broken."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field

import psutil
import psycopg

from tests.chaos.site import LEASE_S, Site

LOOK_S = 0.2
MEMORY_EVERY_S = 5.0
SLACK_S = 0.5

_AUDIT = """
CREATE SEQUENCE chaos_progress;
CREATE FUNCTION chaos_note_progress() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN PERFORM nextval('chaos_progress'); RETURN NULL; END $$;
CREATE TRIGGER chaos_progress AFTER INSERT ON result
FOR EACH STATEMENT EXECUTE FUNCTION chaos_note_progress();

CREATE TABLE chaos_leader (epoch bigint, who text, at timestamptz DEFAULT clock_timestamp(),
                           PRIMARY KEY (epoch, who));
CREATE FUNCTION chaos_note_leader() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN
    IF session_user LIKE 'scheduler%' THEN
        INSERT INTO chaos_leader (epoch, who) SELECT epoch, session_user FROM leader
        ON CONFLICT DO NOTHING;
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER chaos_leader AFTER UPDATE ON slice
FOR EACH STATEMENT EXECUTE FUNCTION chaos_note_leader();
CREATE TRIGGER chaos_leader AFTER INSERT OR UPDATE OR DELETE ON virtual_queue
FOR EACH STATEMENT EXECUTE FUNCTION chaos_note_leader();
"""
"""A count of flushes, and under which leader's epoch each scheduler's writes took effect."""

_LOOK = """
SELECT (SELECT last_value FROM chaos_progress),
       (SELECT count(*) FROM slice WHERE state IN ('queued', 'assigned', 'leased')),
       (SELECT epoch FROM leader), (SELECT holder FROM leader)
"""
_LONG_LEASES = """
SELECT id, instance, lease_until - extract(epoch FROM clock_timestamp())
FROM slice WHERE state = 'leased'
  AND lease_until > extract(epoch FROM clock_timestamp()) + %s
"""
_OLD_LEASES = """
SELECT id, instance, extract(epoch FROM clock_timestamp()) - lease_until
FROM slice WHERE state = 'leased'
  AND lease_until < extract(epoch FROM clock_timestamp()) - %s
"""


@dataclass
class Watch:
    """What was seen. `progress` counts flushes; it may skip, and never goes back."""

    site: Site
    progress: int = 0
    open_slices: int = 0
    violations: list[str] = field(default_factory=list)
    memory: dict[tuple[str, int], list[tuple[float, int]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    """Resident bytes over time, by a process's name and id."""
    _holders: dict[int, str] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)
    _calm_since: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        with self.site.connect() as connection:
            connection.execute(_AUDIT)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stop.set()
        self._thread.join()

    def disturbed(self) -> None:
        """Leases may now be overdue until everything has been calm for a while."""
        self._calm_since = time.monotonic()

    def _run(self) -> None:
        measured = 0.0
        while not self._stop.is_set():
            try:
                with self.site.connect() as connection:
                    while not self._stop.wait(LOOK_S):
                        self._look(connection)
                        if time.monotonic() - measured > MEMORY_EVERY_S:
                            measured = time.monotonic()
                            self._weigh()
            except psycopg.Error:
                self.disturbed()
                self._stop.wait(LOOK_S)

    def _look(self, connection: psycopg.Connection[tuple[object, ...]]) -> None:
        row = connection.execute(_LOOK).fetchone()
        assert row is not None
        progress, open_slices, epoch, holder = row
        # A sequence may jump ahead after a crash of the server.
        self.progress = max(self.progress, int(str(progress)))
        self.open_slices = int(str(open_slices))
        if holder is not None:
            seen = self._holders.setdefault(int(str(epoch)), str(holder))
            if seen != holder:
                self.violations.append(f"epoch {epoch} was led by {seen} and by {holder}")
            if int(str(epoch)) < max(self._holders):
                self.violations.append(f"the leader's epoch went back to {epoch}")
        for row in connection.execute(_LONG_LEASES, (LEASE_S + SLACK_S,)):
            self.violations.append(f"slice {row[0]} is leased by {row[1]} for another {row[2]} s")
        # A lost lease is taken back by the reaper, which itself waits a term after an outage, and
        # whose leader may have to be replaced first.
        if time.monotonic() - self._calm_since > 3 * LEASE_S:
            for row in connection.execute(_OLD_LEASES, (3 * LEASE_S,)):
                self.violations.append(f"slice {row[0]} of {row[1]} ran out {row[2]} s ago")

    def _weigh(self) -> None:
        for name in list(self.site.members):
            with contextlib.suppress(psutil.Error, KeyError):
                pid = self.site.pid(name)
                if pid is not None:
                    size = psutil.Process(pid).memory_info().rss
                    self.memory[name, pid].append((time.monotonic(), size))
