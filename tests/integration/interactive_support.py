"""The interactive line as it runs: a real worker process behind the application on a real port."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psycopg
import redis

from qlm_batch.api.app import create_app
from qlm_batch.api.server import api_server
from qlm_batch.api.services import ApiServices
from qlm_batch.control.interactive import THREADS, Calls
from qlm_batch.dispatch.celery_app import client_url
from qlm_batch.dispatch.dispatcher import CeleryDispatcher
from qlm_batch.dispatch.streams import TokenReader
from qlm_batch.domain.interactive import InteractiveRequest
from qlm_batch.domain.jobs import ApiKey
from qlm_batch.embedded.postgres import EmbeddedPostgres
from qlm_batch.ids import KEY, new_id, new_secret
from qlm_batch.intake.blobs import LocalBlobs
from qlm_batch.settings import Settings
from qlm_batch.store.postgres import PostgresStore
from tests.api_support import wait_until
from tests.contract.harness import MODEL, SECRET_KEY, TENANT, Bench, PostgresHarness
from tests.integration.test_worker import START_S, worker

_numbers = itertools.count()
Json = dict[str, Any]


@dataclass
class Line:
    """An API in this process, and a worker of its own."""

    url: str
    key: str
    bench: Bench
    redis: redis.Redis
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @contextlib.contextmanager
    def client(self, **options: Any) -> Iterator[httpx.Client]:
        """A client with a key."""
        headers = {"authorization": f"Bearer {self.key}"} | options.pop("headers", {})
        with httpx.Client(
            base_url=self.url, headers=headers, timeout=options.pop("timeout", 30.0), **options
        ) as client:
            yield client

    def post(self, path: str, body: Mapping[str, Any], **headers: str) -> httpx.Response:
        """One call."""
        with self.client(headers=headers) as client:
            return client.post(path, json=dict(body))

    def forget(self) -> None:
        """Drop everything stored about requests."""
        harness = self.bench.harness
        assert isinstance(harness, PostgresHarness)
        # Not row by row: workers may just be marking how the last ones ended.
        harness.execute("LOCK TABLE interactive_request; DELETE FROM interactive_request")

    def keys(self) -> set[bytes]:
        """Keys of token streams and readers."""
        return set(self.redis.keys("qlm:*"))

    def requests(self) -> list[InteractiveRequest]:
        """Everything stored, oldest first."""
        harness = self.bench.harness
        assert isinstance(harness, PostgresHarness)
        rows = harness.execute("SELECT tenant, id FROM interactive_request ORDER BY created_at")
        return [
            self.bench.store.interactive(tenant, request_id)
            for tenant, request_id in rows.fetchall()
        ]


def own_redis(redis_url: str, number: int) -> str:
    """Another database on the same server: two lines with equally named instances must not meet."""
    return redis_url.replace("virtual_host=0", f"virtual_host={number}")


@contextlib.contextmanager
def fresh_database(postgres: EmbeddedPostgres) -> Iterator[str]:
    """The URL of a fresh, migrated database."""
    name = f"line_{next(_numbers)}"
    with psycopg.connect(postgres.url_of("postgres"), autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE template_qlm STRATEGY file_copy")
        try:
            yield postgres.url_of(name)
        finally:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


@contextlib.contextmanager
def api_line(
    postgres_url: str,
    redis_url: str,
    data_dir: Path,
    *,
    silent_s: float = 15.0,
    broker_s: float = 30.0,
    **changes: Any,
) -> Iterator[Line]:
    """The API without a worker; an instance silent for `silent_s` counts as lost.

    A broker that is there may take `broker_s`, for it shares a busy machine.
    """
    settings = Settings(
        database_url=postgres_url,
        redis_url=redis_url,
        secret_key="for tests",
        data_dir=data_dir,
        port=0,
        **changes,
    )
    harness = PostgresHarness(postgres_url)
    bench = Bench(harness)
    store = PostgresStore(postgres_url, secret_key=SECRET_KEY, instance_silent_s=silent_s)
    secret = new_secret()
    store.add_key(ApiKey(new_id(KEY), TENANT, "", "user", secret[:12], store.now()), secret)
    courier = CeleryDispatcher(redis_url, timeout_s=broker_s, connections=THREADS)
    calls = Calls(store, courier, TokenReader(redis_url), most_open=settings.interactive_open)
    app = create_app(ApiServices(store, LocalBlobs(data_dir / "blobs"), settings, calls=calls))
    server = api_server(app, settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    watcher = redis.Redis.from_url(client_url(redis_url))
    try:
        wait_until(lambda: server.started, START_S)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Line(f"http://127.0.0.1:{port}", secret, bench, watcher)
    finally:
        server.should_exit = True
        thread.join(30)
        watcher.close()
        store.close()
        harness.close()


@contextlib.contextmanager
def whole_line(
    postgres_url: str,
    redis_url: str,
    data_dir: Path,
    settings: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Iterator[Line]:
    """The API with one worker that is ready; `changes` are the worker's."""
    with (
        api_line(postgres_url, redis_url, data_dir, **(settings or {})) as line,
        worker(line.bench, postgres_url, redis_url, data_dir, **changes) as process,
    ):
        line.workers.append(process)
        yield line


def chat(**more: Any) -> Json:
    """A chat request."""
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Is it so?"}],
        "max_tokens": 8,
    } | more


def events(response: httpx.Response) -> list[Json]:
    """The events of a finished stream, which must end as OpenAI's do."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def text_of(events: list[Json]) -> str:
    """The text a chat stream says."""
    return "".join(
        choice["delta"].get("content") or "" for event in events for choice in event["choices"]
    )
