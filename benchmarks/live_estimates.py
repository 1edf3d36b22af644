"""Promises of a running service against what came: Postgres, Celery, scheduler, worker.

Batches of different sizes, prompts and limits come, some at once and then at random for a while, at
about nine tenths of what the service does; lengths grow by half on the way. Every batch is promised
a p95 when it is accepted, and ends before it or after.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
# Not this folder first: its queue.py would hide the standard library's.
sys.path[0] = str(ROOT)

import numpy as np
import orjson

from benchmarks.support import CHAT, MODEL, TENANT, Stand, finish, load, require, say, stand
from benchmarks.support import wait_until as wait
from qlm_batch.bootstrap import open_blobs
from qlm_batch.domain.jobs import BatchSpec, FilePurpose, FileRecord
from qlm_batch.domain.transitions import TERMINAL
from qlm_batch.ids import BATCH, FILE, new_id
from qlm_batch.scheduling.receipts import Receipt, receipt, reliability

SLOTS: Final = 32
LINES: Final = (8, 64)
LOAD: Final = 0.9
BACKLOG: Final = 20
"""Batches that come at once in the beginning, so that there is something to wait for."""
TEMPLATES: Final = ((8, 64), (60, 192), (200, 96))
"""Words of a prompt, and the most tokens of its answer."""


def live_coverage(seconds: float, seed: int = 0) -> dict[str, float]:
    """The shares of promises done by their p50 and p95, of batches submitted for so long."""
    with stand(engine="simulated", models=(MODEL,), slots=SLOTS, instance="bench-0") as site:
        for name in ("scheduler", "files", "worker"):
            site.start(name)
        rng = np.random.default_rng(seed)
        rate = _requests_per_s(site, rng)
        say(f"the service does {rate:.0f} requests a second ({load()})")
        ids = _submit_all(site, rng, rate, seconds)
        wait(lambda: _open(site) == 0, "the last batches", 600.0, 0.5)
        receipts = [
            own
            for own in (receipt(site.store.batch(TENANT, batch_id)) for batch_id in ids)
            if own is not None
        ]
    return _told(receipts)


def _told(receipts: list[Receipt]) -> dict[str, float]:
    found = reliability(receipts)
    wide = float(np.median([own.p95_s / own.actual_s for own in receipts]))
    say(
        f"{found.count} promises: {found.by_p50:.1%} done by p50, {found.by_p95:.1%} by p95; "
        f"median wait {np.median([own.actual_s for own in receipts]):.1f} s, "
        f"median p95/actual {wide:.2f} ({load()})"
    )
    return {
        "live_promises": float(found.count),
        "live_coverage50": round(found.by_p50, 4),
        "live_coverage95": round(found.by_p95, 4),
        "live_width95": round(wide, 4),
    }


def _requests_per_s(site: Stand, rng: np.random.Generator) -> float:
    """What the service does when it has enough, measured on batches that are not scored."""
    for _ in range(2):
        began = time.monotonic()
        ids = [_submit(site, rng, 0.0, 64) for _ in range(10)]
        wait(lambda: _open(site) == 0, "the first batches", 300.0, 0.2)
        seconds = time.monotonic() - began
    return 64 * len(ids) / seconds


def _submit_all(site: Stand, rng: np.random.Generator, rate: float, seconds: float) -> list[str]:
    ids = [_submit(site, rng, 0.0, int(rng.integers(*LINES))) for _ in range(BACKLOG)]
    began = time.monotonic()
    due = 0.0
    while due < seconds:
        time.sleep(max(0.0, began + due - time.monotonic()))
        lines = int(rng.integers(*LINES))
        ids.append(_submit(site, rng, due / seconds, lines))
        due += float(rng.exponential(lines / (LOAD * rate)))
    return ids


def _submit(site: Stand, rng: np.random.Generator, progress: float, lines: int) -> str:
    """One batch; two thirds of the way on, answers may be half as long again."""
    words, most = TEMPLATES[int(rng.integers(len(TEMPLATES)))]
    most = round(most * (1.5 if progress > 2 / 3 else 1.0))
    path = site.settings.data_dir / f"{new_id(FILE)}.jsonl"
    with path.open("wb") as file:
        for number in range(lines):
            said = " ".join(str(int(n)) for n in rng.integers(0, 10**6, words))
            body = {
                "model": MODEL,
                "messages": [{"role": "user", "content": said}],
                "max_tokens": most,
            }
            line = {"custom_id": str(number), "method": "POST", "url": CHAT, "body": body}
            file.write(orjson.dumps(line) + b"\n")
    record = FileRecord(
        id=path.stem,
        tenant=TENANT,
        purpose=FilePurpose.BATCH,
        filename=path.name,
        bytes=path.stat().st_size,
        sha256="",
        blob_key=f"files/{path.name}",
        created_at=site.store.now(),
    )
    open_blobs(site.settings).adopt(record.blob_key, str(path))
    site.store.add_file(record)
    batch_id = new_id(BATCH)
    site.store.create_batch(batch_id, BatchSpec(TENANT, CHAT, record.id, "1h", 3600.0))
    return batch_id


def _open(site: Stand) -> int:
    states = tuple(sorted(state.value for state in TERMINAL))
    (count,) = site.query(f"SELECT count(*) FROM batch WHERE state NOT IN {states}")
    return int(count)


def main() -> None:
    """Print the shares as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=180.0, help="of arrivals")
    parser.add_argument("--seed", type=int, default=0, help="of the batches and their arrivals")
    options = parser.parse_args()
    found = live_coverage(options.seconds, options.seed)
    require(found["live_promises"] > 0, "no batch had a promise")
    finish(dict(found))


if __name__ == "__main__":
    main()
