"""How fast a file of a million lines becomes a batch in progress, through the real processes."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

# Not this folder first: its queue.py would hide the standard library's.
sys.path[0] = str(Path(__file__).parents[1])

import httpx

from benchmarks.support import (
    CHAT,
    SEAL,
    Stand,
    finish,
    load,
    require,
    say,
    stand,
    wait_until,
    write_requests,
)


def main() -> None:
    """Upload and create through the API, read in by `qlm files`; then count and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--line-bytes", type=int, default=1024)
    options = parser.parse_args()
    with stand() as site:
        path = site.settings.data_dir / "input.jsonl"
        say(f"writing {options.lines:,} lines")
        seal = write_requests(path, options.lines, options.line_bytes)
        for name in ("api", "files"):
            site.start(name)
        with httpx.Client(
            base_url=site.url,
            headers={"Authorization": f"Bearer {site.key}"},
            timeout=600,
            trust_env=False,
        ) as client:
            wait_until(lambda: _answers(client), "the API", 60)
            site.settle()
            say(f"uploading {path.stat().st_size / 1e6:,.0f} MB ({load()})")
            before = site.cpu_s()
            began = time.monotonic()
            file_id = _upload(client, path)
            uploaded = time.monotonic() - began
            batch_id = _create(client, file_id)
            wait_until(lambda: _in_progress(client, batch_id), "the batch", 1800, every_s=0.2)
            seconds = time.monotonic() - began
        spent = {name: round(cpu - before[name], 2) for name, cpu in site.cpu_s().items()}
        peaks = site.peak_rss_mb()
        say(f"uploaded in {uploaded:.2f} s, in progress after {seconds:.2f} s")
        say(f"CPU seconds {spent}, peak MB {peaks} ({load()})")
        _audit(site, batch_id, options.lines, seal)
        finish(
            {
                "lines": options.lines,
                "seconds": round(seconds, 2),
                "lines_per_s": round(options.lines / seconds),
                "peak_rss_mb": max(peaks.values()),
            }
        )


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/models").status_code == 200
    except httpx.TransportError:
        return False


def _upload(client: httpx.Client, path: Path) -> str:
    with path.open("rb") as file:
        answer = client.post(
            "/files", files={"file": ("input.jsonl", file)}, data={"purpose": "batch"}
        )
    require(answer.status_code == 200, answer.text)
    return str(answer.json()["id"])


def _create(client: httpx.Client, file_id: str) -> str:
    answer = client.post(
        "/batches",
        json={"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"},
    )
    require(answer.status_code == 200, answer.text)
    return str(answer.json()["id"])


def _in_progress(client: httpx.Client, batch_id: str) -> bool:
    batch = client.get(f"/batches/{batch_id}").json()
    require(batch["status"] in ("validating", "in_progress"), str(batch))
    return bool(batch["status"] == "in_progress")


def _audit(site: Stand, batch_id: str, lines: int, seal: int) -> None:
    say("auditing")
    rows, ids, places, found = site.query(
        "SELECT count(*), count(DISTINCT custom_id), count(DISTINCT (run_id, position)),"
        f" {SEAL} FROM request JOIN run ON run.id = run_id WHERE batch_id = '{batch_id}'"
    )
    require((rows, ids, places) == (lines, lines, lines), f"rows {rows}, ids {ids}, keys {places}")
    require(found == seal, "the stored bodies are not those of the file")
    (covered,) = site.query(
        f"SELECT sum(hi - lo) FROM slice WHERE batch_id = '{batch_id}' AND state = 'queued'"
    )
    require(covered == lines, f"slices cover {covered} lines")


if __name__ == "__main__":
    main()
