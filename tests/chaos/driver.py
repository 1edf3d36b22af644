"""One run: start everything, load it, break it, mend it, and check what must hold."""

from __future__ import annotations

import signal
import statistics
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlm_batch.bootstrap import open_store
from qlm_batch.domain.jobs import ApiKey
from qlm_batch.ids import KEY, new_id, new_secret
from qlm_batch.settings import Settings
from tests.chaos import invariants, real
from tests.chaos.answers import MODEL
from tests.chaos.batches import Load, Tally
from tests.chaos.callers import Callers, Receivers, until
from tests.chaos.client import Client
from tests.chaos.faults import Faults, complain
from tests.chaos.schedule import Fault, plan
from tests.chaos.site import SECRET_KEY, Site

TENANTS = ("acme", "beta", "gamma")
SETTLE_S = 180.0
MOST_FAULTS = 5000


@dataclass(frozen=True)
class Order:
    """What a run does: simulated faults for `seconds`, then real vLLM."""

    seed: int
    seconds: float
    lanes: int = 1
    most_lines: int = 400
    real_requests: int = 0
    real_kills: int = 0


@dataclass
class Outcome:
    """The figures, and the evidence against each invariant that did not hold."""

    figures: dict[str, Any]
    broken: dict[str, list[str]] = field(default_factory=dict)


def run(order: Order, folder: Path, enough: threading.Event) -> Outcome:
    """Carry out one run in an empty folder; everything it started has ended afterwards.

    Set `enough` to break nothing more and come to the checks.
    """
    shared_before = invariants.shared_memory()
    receivers = Receivers()
    receivers.start()
    site = Site(folder, smtp_url=receivers.smtp_url)
    try:
        site.start()
        found, real_figures = _work(order, site, receivers, enough)
        complain("checking")
        broken = invariants.check(found)
        figures = _figures(found, real_figures)
        found.watch.stop()
        # Its next life sweeps what its last ones left half written.
        _sweep(site)
        statuses = site.stop()
        site.stop_servers()
        secrets = (*found.callers.keys.values(), site.postgres.password, SECRET_KEY)
        if left := invariants.nothing_is_left_behind(site, statuses, shared_before, secrets):
            broken["nothing_is_left_behind"] = left
    finally:
        site.stop()
        site.stop_servers()
        receivers.stop()
    return Outcome(figures, broken)


def _work(
    order: Order, site: Site, receivers: Receivers, enough: threading.Event
) -> tuple[invariants.Findings, dict[str, int]]:
    from tests.chaos.watch import Watch

    keys = _keys(site)
    clients = {tenant: Client(site.url, key) for tenant, key in keys.items()}
    watch, tally = Watch(site), Tally()
    callbacks = {"webhook": receivers.webhook_url, "email": "you@example.com"}
    load = Load(clients, tally, callbacks, order.seed, order.most_lines)
    callers = Callers(site.url, keys, order.seed)
    faults = Faults(site, watch, load, receivers, complain)
    first = clients[TENANTS[0]]
    if not until(lambda: MODEL in first.call("GET", "/v1/models").text, 120):
        raise AssertionError(f"the service did not start; see {site.folder / 'logs'}")
    load.start(order.lanes)
    callers.start()
    until(lambda: watch.progress > 3, 60)
    _break(order, faults, enough)
    if not load.close(SETTLE_S):
        tally.faults.append(f"batches did not end within {SETTLE_S:.0f} s")
    callers.close()
    complain(f"interactive calls: {dict(callers.outcomes)}")
    real_figures = {"requests": 0, "kills": 0}
    if order.real_requests:
        real_figures = real.round(
            site, first, tally, callbacks, order.seed, order.real_requests, order.real_kills
        )
    for client in clients.values():
        tally.faults += client.server_errors
        client.close()
    return invariants.Findings(site, tally, callers, receivers, faults, watch), real_figures


def _sweep(site: Site) -> None:
    """Let the service clear away what its killed processes left half written, if anything."""
    if not invariants.half_written(site):
        return
    pid = site.pid("files")
    site.signal("files", signal.SIGTERM)
    until(lambda: site.pid("files") not in (None, pid), 30)
    until(lambda: not invariants.half_written(site), 30)


def _break(order: Order, faults: Faults, enough: threading.Event) -> None:
    end = time.monotonic() + order.seconds
    for fault in _endless(order.seed):
        if time.monotonic() > end or enough.is_set():
            return
        faults.carry_out(fault)


def _endless(seed: int) -> list[Fault]:
    # More than any run comes to; those that a shorter run leaves out are the last.
    return plan(seed, MOST_FAULTS)


def _keys(site: Site) -> dict[str, str]:
    """One key for each tenant."""
    settings = Settings(database_url=site.postgres.url, secret_key=SECRET_KEY)
    store, keys = open_store(settings), {}
    try:
        for tenant in TENANTS:
            keys[tenant] = new_secret()
            made = ApiKey(
                id=new_id(KEY),
                tenant=tenant,
                name="chaos",
                role="admin",
                prefix=keys[tenant][:12],
                created_at=store.now(),
            )
            store.add_key(made, keys[tenant])
    finally:
        store.close()
    return keys


def _figures(found: invariants.Findings, real_figures: dict[str, int]) -> dict[str, Any]:
    tally, resumed = found.tally, found.faults.resumed
    return {
        "requests": tally.requests - real_figures["requests"],
        "kills": found.site.kills - real_figures["kills"],
        "db_crashes": found.site.database_crashes,
        "lost": len(tally.lost),
        "duplicated": len(tally.duplicated),
        "non_poison_errors": len(tally.non_poison_errors) + len(tally.wrong),
        "late_duplicates": invariants.late_duplicates(found.site),
        "recomputed": invariants.recomputed(found.site.notes)[1],
        "resume_s_median": round(statistics.median(resumed), 2) if resumed else None,
        "resume_s_max": round(max(resumed), 2) if resumed else None,
        "real_vllm": real_figures,
    }
