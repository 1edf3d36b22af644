"""What only the in-memory store promises: size, and sharing between threads."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from qlm_batch.domain.jobs import CHAT, BatchSpec, FilePurpose, FileRecord, RequestLine
from qlm_batch.domain.store import Store
from qlm_batch.store.memory import MemoryStore


def filled(lines: int, slice_requests: int = 64) -> MemoryStore:
    """A store with one batch in progress."""
    made = MemoryStore(lambda: 1000.0)
    store: Store = made
    store.add_file(FileRecord("f", "t", FilePurpose.BATCH, "f", 1, "", "f", 0.0))
    store.create_batch("b", BatchSpec("t", CHAT, "f", "1h", 3600.0))
    assert store.claim_intake("i", 60.0)
    body = "{}"
    rows = (RequestLine(n, f"c{n}", "m", body, 10, 20) for n in range(1, lines + 1))
    assert store.load_lines("b", "i", rows, slice_requests) == lines
    return made


def test_a_snapshot_costs_the_same_for_many_requests_as_for_few() -> None:
    store = filled(100_000)
    # Its own time: others on this machine may take as much as they like.
    began = time.thread_time()
    for _ in range(100):
        snapshot = store.snapshot()
    assert time.thread_time() - began < 1.0
    (run,) = snapshot.runs
    assert (run.requests, run.prompt_tokens, run.max_tokens) == (100_000, 1_000_000, 2_000_000)


def test_threads_that_lead_at_once_see_one_leader() -> None:
    store = filled(1)
    with ThreadPoolExecutor(8) as pool:
        epochs = list(pool.map(lambda n: store.lead(f"h{n}", 10.0), range(64)))
    assert [epoch for epoch in epochs if epoch is not None] == [1]
