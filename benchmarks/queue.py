"""How many requests a second go from queued to a stored result, with an engine that takes no time.

One worker process and one scheduler process, as in production: the worker claims, "runs" and
stores over the same ledger, and the scheduler plans and hands out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# Not this folder first: its queue.py would hide the standard library's.
sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.support import (
    CHAT,
    MODEL,
    TENANT,
    Stand,
    finish,
    load,
    require,
    say,
    stand,
    wait_until,
    write_requests,
)
from qlm_batch.bootstrap import open_blobs
from qlm_batch.domain.jobs import Batch, BatchSpec, BatchState, FilePurpose, FileRecord
from qlm_batch.ids import BATCH, FILE, new_id

LEAST_BYTES = 500


def main() -> None:
    """Queue a batch for a warm worker and time it from in_progress to finalizing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--line-bytes", type=int, default=900)
    parser.add_argument("--slots", type=int, default=1024)
    options = parser.parse_args()
    with stand(
        engine="simulated",
        simulated_time_scale=0.0,
        models=(MODEL,),
        slots=options.slots,
        instance="bench-0",
    ) as site:
        for name in ("scheduler", "files", "worker"):
            site.start(name)
        say("warming up")
        _run(site, _submit(site, 2_000, options.line_bytes))
        site.settle()
        say(f"queueing {options.requests:,} requests ({load()})")
        before = site.cpu_s()
        batch = _run(site, _submit(site, options.requests, options.line_bytes))
        spent = {name: round(cpu - before.get(name, 0), 2) for name, cpu in site.cpu_s().items()}
        assert batch.in_progress_at is not None
        assert batch.finalizing_at is not None
        seconds = batch.finalizing_at - batch.in_progress_at
        say(f"{seconds:.2f} s; CPU seconds {spent}; peak MB {site.peak_rss_mb()} ({load()})")
        _audit(site, batch, options.requests)
        finish(
            {
                "requests": options.requests,
                "seconds": round(seconds, 2),
                "requests_per_s": round(options.requests / seconds),
            }
        )


def _submit(site: Stand, lines: int, line_bytes: int) -> str:
    path = site.settings.data_dir / f"{lines}.jsonl"
    write_requests(path, lines, line_bytes)
    now = site.store.now()
    record = FileRecord(
        id=new_id(FILE),
        tenant=TENANT,
        purpose=FilePurpose.BATCH,
        filename=path.name,
        bytes=path.stat().st_size,
        sha256="",
        blob_key=f"files/{path.name}",
        created_at=now,
    )
    open_blobs(site.settings).adopt(record.blob_key, str(path))
    site.store.add_file(record)
    batch_id = new_id(BATCH)
    site.store.create_batch(
        batch_id,
        BatchSpec(
            tenant=TENANT,
            endpoint=CHAT,
            input_file_id=record.id,
            completion_window="24h",
            window_s=86_400.0,
        ),
    )
    return batch_id


def _run(site: Stand, batch_id: str) -> Batch:
    wait_until(lambda: _settled(site, batch_id), "the batch", 1800, every_s=0.5)
    return site.store.batch(TENANT, batch_id)


def _settled(site: Stand, batch_id: str) -> bool:
    batch = site.store.batch(TENANT, batch_id)
    require(batch.state is not BatchState.FAILED, str(batch.errors))
    return batch.finalizing_at is not None


def _audit(site: Stand, batch: Batch, requests: int) -> None:
    say("auditing")
    counts = batch.counts
    require((counts.completed, counts.failed) == (requests, 0), str(counts))
    rows, keys, short, bad = site.query(
        "SELECT count(*), count(DISTINCT (x.run_id, x.position)),"
        f" count(*) FILTER (WHERE length(x.body) < {LEAST_BYTES}"
        f" OR length(r.body) < {LEAST_BYTES}), count(*) FILTER (WHERE NOT ok)"
        " FROM result x JOIN request r USING (run_id, position) JOIN run ON run.id = x.run_id"
        f" WHERE batch_id = '{batch.id}'"
    )
    require((rows, keys, bad) == (requests, requests, 0), f"{rows} rows, {keys} keys, {bad} bad")
    require(short == 0, f"{short} bodies or results under {LEAST_BYTES} bytes")


if __name__ == "__main__":
    main()
