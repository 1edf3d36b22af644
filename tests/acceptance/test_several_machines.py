"""Every process on its own, over TCP, with the variables of the compose file."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psycopg
import pytest
from openai import OpenAI
from openai.types import Batch

from qlm_batch.embedded.folders import Folders
from tests.cluster_support import Cluster, TcpPostgres, TcpValkey, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ENDED = ("completed", "failed", "expired", "cancelled")
LINES = 600
AWAY_S = float(os.environ.get("QLM_TEST_AWAY_S", "0"))
"""How long each server stays away at least; 60 makes it the whole minute that is promised."""
PROCESSES = ("api", "scheduler-1", "scheduler-2", "files", "callbacks", "gpu-0", "gpu-1")


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[tuple[TcpPostgres, TcpValkey]]:
    tmp_path.chmod(0o711)
    folders = Folders.under(tmp_path / "servers")
    postgres, valkey = TcpPostgres(folders), TcpValkey(folders)
    try:
        postgres.start()
        valkey.start()
        yield postgres, valkey
    finally:
        valkey.stop()
        postgres.stop()
        folders.remove_all()


@pytest.fixture
def cluster(tmp_path: Path, servers: tuple[TcpPostgres, TcpValkey]) -> Iterator[Cluster]:
    """Everything in the compose file, with two workers whose engines are simulated."""
    extra = {
        "QLM_ENGINE": "simulated",
        "QLM_SIMULATED_TIME_SCALE": "0.1",
        "QLM_LEASE_S": "10",
        "QLM_LEADER_TERM_S": "4",
    }
    made = Cluster(tmp_path, *servers, extra=extra)
    made.qlm("db", "upgrade", service="migrate")
    try:
        made.start("api", QLM_HOST="127.0.0.1")
        made.start("scheduler-1", "scheduler")
        made.start("scheduler-2", "scheduler")
        made.start("files")
        made.start("callbacks")
        made.start("gpu-0", "worker", QLM_INSTANCE="gpu-0")
        made.start("gpu-1", "worker", QLM_INSTANCE="gpu-1")
        wait_until(made.answers, 240)
        yield made
    finally:
        made.stop()


@pytest.fixture
def client(cluster: Cluster) -> OpenAI:
    """A client that tries again where the service asks it to."""
    key = cluster.qlm("keys", "create", "--tenant", "acme", "--name", "ada")
    return OpenAI(base_url=cluster.url, api_key=key, max_retries=12)


def submit(client: OpenAI, name: str) -> Batch:
    lines = [
        {
            "custom_id": f"{name}-{n}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": "sim",
                "messages": [{"role": "user", "content": f"Question {n} of {name}"}],
                "max_tokens": 64,
            },
        }
        for n in range(LINES)
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = client.files.create(file=(f"{name}.jsonl", content), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="1h"
    )


def ended(client: OpenAI, batch: Batch, seconds: float = 300) -> Batch:
    wait_until(lambda: client.batches.retrieve(batch.id).status in ENDED, seconds)
    return client.batches.retrieve(batch.id)


def assert_whole(client: OpenAI, batch: Batch, name: str) -> None:
    """Completed, each line answered once, nothing failed."""
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (LINES, 0)
    assert batch.output_file_id is not None and batch.error_file_id is None
    rows = client.files.content(batch.output_file_id).text.splitlines()
    ids = [json.loads(row)["custom_id"] for row in rows]
    assert sorted(ids) == sorted(f"{name}-{n}" for n in range(LINES))


def test_each_process_is_restarted_under_load_and_nothing_is_lost(
    cluster: Cluster, client: OpenAI
) -> None:
    wait_until(lambda: "sim" in [model.id for model in client.models.list().data], 240)
    batches = {"first": submit(client, "first")}
    rolled = threading.Event()
    failures: list[str] = []

    def load() -> None:
        """Keep a batch or two in the queue until everything was restarted."""
        number = 0
        while not rolled.is_set():
            name = f"load{number}"
            try:
                batches[name] = submit(client, name)
                wait_until(
                    lambda made=batches[name]: (
                        rolled.is_set() or client.batches.retrieve(made.id).status in ENDED
                    ),
                    300,
                )
            except Exception as error:  # noqa: BLE001 - told by the test itself
                failures.append(repr(error))
                return
            number += 1

    loader = threading.Thread(target=load)
    loader.start()
    try:
        for name in PROCESSES:
            assert cluster.end(name, 120) == 0, cluster.log(name)
            cluster.begin(name)
            wait_until(cluster.answers, 240)
    finally:
        rolled.set()
        loader.join()
    assert failures == []
    batches["last"] = submit(client, "last")
    assert len(batches) >= 3
    for name, batch in batches.items():
        assert_whole(client, ended(client, batch), name)
    for name in PROCESSES:
        assert cluster.processes[name].poll() is None
        assert "Traceback" not in cluster.log(name), cluster.log(name)
    served = {instance for batch in batches.values() for instance in _instances(cluster, batch.id)}
    assert served == {"gpu-0", "gpu-1"}


def _instances(cluster: Cluster, batch_id: str) -> set[str]:
    with psycopg.connect(cluster.postgres.url) as connection:
        rows = connection.execute(
            "SELECT DISTINCT instance FROM result JOIN run ON run.id = run_id WHERE batch_id = %s",
            (batch_id,),
        )
        return {row[0] for row in rows}


def test_an_outage_is_told_and_work_goes_on_by_itself(cluster: Cluster, client: OpenAI) -> None:
    wait_until(lambda: "sim" in [model.id for model in client.models.list().data], 240)
    begun = submit(client, "begun")
    wait_until(lambda: _some_done(client, begun), 240)

    key = {"Authorization": f"Bearer {client.api_key}"}
    with httpx.Client(base_url=cluster.url, headers=key, timeout=30, trust_env=False) as plain:
        cluster.valkey.stop()
        back_at = time.monotonic() + AWAY_S
        hintless = submit(client, "hintless")
        call = {"model": "sim", "messages": [{"role": "user", "content": "Hello?"}]}
        wait_until(lambda: _says_when_to_return(plain.post("/chat/completions", json=call)))
        assert_whole(client, ended(client, begun), "begun")
        assert_whole(client, ended(client, hintless), "hintless")
        wait_until(lambda: time.monotonic() >= back_at, 2 * AWAY_S + 1)
        cluster.valkey.start()

        interrupted = submit(client, "interrupted")
        wait_until(lambda: _some_done(client, interrupted), 240)
        cluster.postgres.stop()
        back_at = time.monotonic() + AWAY_S
        batch = {"input_file_id": "file-x", "endpoint": "/v1/embeddings", "completion_window": "1h"}
        while True:
            for answer in (
                plain.get("/batches"),
                plain.get(f"/batches/{interrupted.id}"),
                plain.post("/batches", json=batch),
                plain.post("/files", files={"file": b"{}"}, data={"purpose": "batch"}),
            ):
                assert _says_when_to_return(answer), answer.text
            if time.monotonic() >= back_at:
                break
    assert cluster.answers("/healthz")
    assert not cluster.answers("/readyz")
    cluster.postgres.start()
    assert_whole(client, ended(client, interrupted), "interrupted")
    assert_whole(client, ended(client, submit(client, "after")), "after")
    for name in PROCESSES:
        assert cluster.processes[name].poll() is None, cluster.log(name)


def _says_when_to_return(answer: httpx.Response) -> bool:
    return (
        answer.status_code == 503
        and int(answer.headers["retry-after"]) >= 1
        and answer.json()["error"].keys() == {"message", "type", "param", "code"}
    )


def _some_done(client: OpenAI, batch: Batch) -> bool:
    counts = client.batches.retrieve(batch.id).request_counts
    return counts is not None and counts.completed > 0
