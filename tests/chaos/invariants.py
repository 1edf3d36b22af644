"""What must hold whatever was broken. Each function returns its evidence against it."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import psycopg

from tests.chaos.batches import Tally
from tests.chaos.callers import Callers, Receivers, until
from tests.chaos.faults import Faults
from tests.chaos.site import Site, log_lines
from tests.chaos.watch import Watch
from tests.chaos.worker import NOTE

MOST_RECOMPUTED = 0.01
UNFLUSHED = 128
"""Results a simulated engine brings in the time of one flush on a busy machine."""
GROWTH = 1.5
GROWTH_BYTES = 64 * 1024**2
STEADY_S = 120.0
"""How long a process must have lived before its memory is compared with its own."""


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything that was seen of one run."""

    site: Site
    tally: Tally
    callers: Callers
    receivers: Receivers
    faults: Faults
    watch: Watch


def _rows(site: Site, query: str, *given: object) -> list[tuple[object, ...]]:
    with site.connect() as connection:
        return list(connection.execute(query, given))


# 1


def every_request_succeeds_unless_it_is_poison(found: Findings) -> list[str]:
    """Answers are the expected ones; errors are exactly poison, the expired and the cancelled."""
    return found.tally.wrong + found.tally.non_poison_errors


# 2


def files_account_for_every_line_once(found: Findings) -> list[str]:
    """Output and error lines are the lines in, each once, and agree with the counts."""
    return found.tally.lost + found.tally.duplicated + found.tally.faults


def the_ledger_has_one_outcome_for_every_request(found: Findings) -> list[str]:
    """Counts of ended batches are those of the rows behind them."""
    return [
        f"batch {row}"
        for row in _rows(
            found.site,
            """
            SELECT b.id, b.state, b.total, b.completed, b.failed, b.open_slices, d.lines, d.good
            FROM batch b JOIN LATERAL (
                SELECT count(*) AS lines, count(*) FILTER (WHERE EXISTS (
                    SELECT FROM result x WHERE x.run_id = r.run_id AND x.position = r.position
                                           AND x.ok)) AS good
                FROM run u JOIN request r ON r.run_id = u.id WHERE u.batch_id = b.id) d ON true
            WHERE b.state NOT IN ('completed', 'failed', 'expired', 'cancelled')
               OR b.open_slices <> 0 OR b.total <> d.lines OR b.completed <> d.good
               OR b.completed + b.failed <> b.total
            """,
        )
    ]


# 3


def one_event_per_batch_and_generation_is_delivered(found: Findings) -> list[str]:
    """Each ended generation has one event, delivered at least once and always under one id."""
    for _ in range(3):
        # An attempt may meet a receiver that has no turn in time, and the next would be far off.
        _hurry(found.site)
        if until(lambda: not _pending(found.site), 15, 0.5):
            break
    broken = [f"not delivered: {row}" for row in _pending(found.site)]
    rows = _rows(
        found.site, "SELECT batch_id, generation, channel, event_id FROM outbox ORDER BY id"
    )
    told: defaultdict[tuple[object, object], set[object]] = defaultdict(set)
    for batch, generation, channel, event in rows:
        told[batch, generation].add(event)
        arrived = (
            found.receivers.webhooks.get(str(event))
            if channel == "webhook"
            else any(str(event) in message for message in found.receivers.mails)
        )
        if not arrived:
            broken.append(f"event {event} of {batch}.{generation} never arrived by {channel}")
    broken += [f"{key} has the events {ids}" for key, ids in told.items() if len(ids) != 1]
    broken += [
        f"event {event} was told about {set(batches)}"
        for event, batches in found.receivers.webhooks.items()
        if len(set(batches)) != 1 or (batches[0] not in {batch for batch, _ in told})
    ]
    broken += [f"{key} ended and has no event" for key in found.tally.ended if key not in told]
    return broken


def _pending(site: Site) -> list[tuple[object, ...]]:
    return _rows(site, "SELECT event_id, channel, attempts FROM outbox WHERE state <> 'delivered'")


def _hurry(site: Site) -> None:
    """Let the waits between attempts, which are hours in the end, be over."""
    _rows(
        site,
        "UPDATE outbox SET next_attempt_at = 0, claim_until = NULL, state = 'pending'"
        " WHERE state <> 'delivered' RETURNING 1",
    )


# 4


def leases_and_leaders_kept_to_their_terms(found: Findings) -> list[str]:
    """Seen many times a second: leases within their term, one leader per epoch."""
    return found.watch.violations


def no_two_leaders_wrote_in_one_epoch(found: Findings) -> list[str]:
    """Under each epoch the writes of one scheduler took effect."""
    return [
        f"epoch {row}"
        for row in _rows(
            found.site,
            "SELECT epoch, array_agg(who) FROM chaos_leader GROUP BY epoch HAVING count(*) > 1",
        )
    ]


def no_slice_closed_with_gaps(found: Findings) -> list[str]:
    """Every line of a slice that is done has its row in the generation, or an older success."""
    return [
        f"slice {row}"
        for row in _rows(
            found.site,
            """
            SELECT s.id, s.batch_id, s.generation, count(*)
            FROM slice s JOIN request r
              ON r.run_id = s.run_id AND r.position >= s.lo AND r.position < s.hi
            WHERE s.state = 'done' AND NOT EXISTS (
                SELECT FROM result x WHERE x.run_id = r.run_id AND x.position = r.position
                                       AND (x.generation = s.generation OR x.ok))
            GROUP BY s.id, s.batch_id, s.generation
            """,
        )
    ] + [
        f"open slice {row}"
        for row in _rows(
            found.site,
            "SELECT id, batch_id, state FROM slice"
            " WHERE state IN ('queued', 'assigned', 'leased') OR lease_until IS NOT NULL",
        )
    ]


def nothing_came_from_another_generation(found: Findings) -> list[str]:
    """No row has a generation its batch never had, or stands behind a success."""
    return [
        f"row {row}"
        for row in _rows(
            found.site,
            """
            SELECT x.run_id, x.position, x.generation
            FROM result x JOIN run u ON u.id = x.run_id JOIN batch b ON b.id = u.batch_id
            WHERE x.generation > b.generation
               OR EXISTS (SELECT FROM result y WHERE y.run_id = x.run_id
                          AND y.position = x.position AND y.ok AND y.generation < x.generation)
            """,
        )
    ]


# 5


def interactive_requests_end(found: Findings) -> list[str]:
    """Every call ended with an answer, an error or an abort, and no request is left open."""
    left = "SELECT id, state, instance, epoch FROM interactive_request WHERE ended_at IS NULL"
    # The sweep leaves callers minutes; all of them have gone.
    _rows(
        found.site,
        "UPDATE interactive_request SET created_at = created_at - 3600"
        " WHERE ended_at IS NULL RETURNING 1",
    )
    until(lambda: not _rows(found.site, left), 40, 0.5)
    return found.callers.violations + [f"left open: {row}" for row in _rows(found.site, left)]


# 6


def work_resumes_after_every_fault(found: Findings) -> list[str]:
    """Within ten seconds of a fault's end, terms of leases aside."""
    return found.faults.violations


def little_is_computed_again(found: Findings) -> list[str]:
    """At most one result in a hundred is computed again after it was finished.

    Where there was little to do, at most what a worker has not flushed when it is killed.
    """
    distinct, again = recomputed(found.site.notes)
    most = max(MOST_RECOMPUTED * distinct, UNFLUSHED * found.site.worker_kills)
    return [f"{again} of {distinct}, more than {most:.0f}"] if again > most else []


def recomputed(notes: Path) -> tuple[int, int]:
    """Requests that were answered, and answers begun although there was one already."""
    ended: dict[int, float] = {}
    again = 0
    data = notes.read_bytes() if notes.exists() else b""
    whole = len(data) - len(data) % NOTE.size
    for key, began, finished in sorted(NOTE.iter_unpack(data[:whole]), key=lambda n: n[2]):
        again += key in ended and began > ended[key]
        ended.setdefault(key, finished)
    return len(ended), again


def late_duplicates(site: Site) -> int:
    """Rows the store refused because their request had one, as the workers tell."""
    names = {path.stem for path in (site.folder / "logs").glob("gpu-*.log")}
    return sum(
        int(str(line.get("rejected", 0)))
        for name in names
        for line in log_lines(site.folder, name)
        if line.get("event") == "rows the store had no use for"
    )


# 7


def memory_stays_flat(found: Findings) -> list[str]:
    """A process that lived long has at its end little more than soon after its start."""
    broken = []
    for (name, pid), sizes in found.watch.memory.items():
        if sizes[-1][0] - sizes[0][0] < STEADY_S:
            continue
        third = max(1, len(sizes) // 3)
        early = max(size for _, size in sizes[:third])
        late = sorted(size for _, size in sizes[-third:])[third // 2]
        if late > GROWTH * early + GROWTH_BYTES:
            broken.append(f"{name} ({pid}) grew from {early >> 20} to {late >> 20} MiB")
    return broken


def no_process_crashed_by_itself(found: Findings) -> list[str]:
    """No traceback in any log but those of what was broken on purpose."""
    return [
        f"{name}: {text}"
        for name in sorted(path.stem for path in (found.site.folder / "logs").glob("*.log"))
        for text in _crashes(found.site, name)
    ]


_CRASHES = frozenset({"pass_crashed", "service_gave_up", "worker loop crashed", "worker crashed"})


def _crashes(site: Site, name: str) -> Iterator[str]:
    for line in log_lines(site.folder, name):
        if line.get("event") in _CRASHES or (
            line.get("level") == "error" and line.get("event") == "export_disagrees"
        ):
            yield str(line)[-600:]


INVARIANTS: tuple[Callable[[Findings], list[str]], ...] = (
    every_request_succeeds_unless_it_is_poison,
    files_account_for_every_line_once,
    the_ledger_has_one_outcome_for_every_request,
    one_event_per_batch_and_generation_is_delivered,
    leases_and_leaders_kept_to_their_terms,
    no_two_leaders_wrote_in_one_epoch,
    no_slice_closed_with_gaps,
    nothing_came_from_another_generation,
    interactive_requests_end,
    work_resumes_after_every_fault,
    little_is_computed_again,
    memory_stays_flat,
    no_process_crashed_by_itself,
)
"""Checked while the service is still up."""


def nothing_is_left_behind(
    site: Site,
    statuses: Mapping[str, int],
    shared_before: frozenset[str],
    secrets: Collection[str],
) -> list[str]:
    """After the end: orderly exits, and no process, socket, temporary file or shared memory.

    Nor do the logs tell secrets.
    """
    broken = [f"{name} ended with {status}" for name, status in statuses.items() if status]
    # Those that end when their parent has are a moment later.
    until(lambda: not site.left_over(), 10, 0.5)
    broken += [f"process {told}" for told in site.left_over()]
    broken += [f"temporary file {path}" for path in half_written(site)]
    left = shared_memory() - shared_before - _in_use()
    if left:
        # Others on this machine have names there for moments.
        time.sleep(3)
        left &= shared_memory() - _in_use()
    broken += [f"shared memory {name}" for name in left]
    broken += [
        f"a secret in {path.name}"
        for path in (site.folder / "logs").glob("*.log")
        if any(secret in path.read_text(errors="replace") for secret in secrets)
    ]
    return broken


def half_written(site: Site) -> list[Path]:
    """Files that were being written."""
    folders = ("spool", "scratch", "blobs/.scratch")
    return [path for folder in folders for path in (site.data / folder).glob("*")]


def shared_memory() -> frozenset[str]:
    """Named segments of shared memory on this machine."""
    folder = Path("/dev/shm")
    return frozenset(path.name for path in folder.iterdir()) if folder.is_dir() else frozenset()


def _in_use() -> frozenset[str]:
    """Segments that living processes, none of this run any more, have mapped or open.

    Told by their inodes: a semaphore is mapped under another name than it has.
    """
    inodes: set[int] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
                if "/dev/shm/" in line:
                    inodes.add(int(line.split()[4]))
        with contextlib.suppress(OSError):
            for opened in Path(f"/proc/{process.pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if str(opened.readlink()).startswith("/dev/shm/"):
                        inodes.add(opened.stat().st_ino)
    used = set()
    for name in shared_memory():
        with contextlib.suppress(OSError):
            if (Path("/dev/shm") / name).stat().st_ino in inodes:
                used.add(name)
    return frozenset(used)


def check(found: Findings) -> dict[str, list[str]]:
    """The evidence against each invariant that does not hold."""
    broken = {}
    for invariant in INVARIANTS:
        try:
            evidence = invariant(found)
        except psycopg.Error as fault:
            evidence = [f"could not be checked: {fault}"]
        if evidence:
            broken[invariant.__name__] = evidence
    return broken
