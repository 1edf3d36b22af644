"""Shared by the tests of the REST API: an application over the memory store, and its back end."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.testclient import TestClient

from qlm_batch.api.app import create_app
from qlm_batch.api.server import api_server
from qlm_batch.api.services import ApiServices
from qlm_batch.domain.jobs import (
    ApiKey,
    Batch,
    ClaimedRequest,
    EngineKind,
    FilePurpose,
    FileRecord,
    RequestLine,
    ResultRow,
    Usage,
)
from qlm_batch.domain.ledger import Held
from qlm_batch.domain.records import Heartbeat
from qlm_batch.domain.snapshot import Assignment, InstanceState, ModelView, Residency
from qlm_batch.domain.store import Store
from qlm_batch.ids import FILE, KEY, new_id, new_secret
from qlm_batch.intake.blobs import LocalBlobs
from qlm_batch.intake.results import render_line
from qlm_batch.settings import Settings
from qlm_batch.store.memory import MemoryStore

CHAT = "/v1/chat/completions"
MODEL = "test/tiny"
Json = dict[str, Any]
Answers = Callable[[ClaimedRequest], tuple[int, Json]]


AT_WORK: Mapping[str, float] = {
    "running": 7,
    "interactive_running": 2,
    "batch_cap": 6,
    "evictions": 4,
    "recomputed_tokens": 90,
    "output_tokens": 1234,
    "kv_usage": 0.25,
}
"""What is seen of an instance in the middle of things."""


@dataclass
class Clock:
    """Time that moves only when told."""

    at: float = 1_800_000_000.0

    def __call__(self) -> float:
        return self.at


def says_yes(request: ClaimedRequest) -> tuple[int, Json]:
    """Every request succeeds."""
    return 200, {"object": "chat.completion", "choices": [{"message": {"content": "yes"}}]}


def input_file(*ids: str) -> bytes:
    """A file of chat requests with these custom ids."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Is it so?"}]}
    return b"".join(
        json.dumps({"custom_id": name, "method": "POST", "url": CHAT, "body": body}).encode()
        + b"\n"
        for name in ids
    )


@dataclass
class Site:
    """One service without processes: the application, its store, and the work behind it by hand."""

    folder: Path
    settings: Settings
    other_store: Store | None = None
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.store: Store = self.other_store or MemoryStore(now=self.clock)
        self.blobs = LocalBlobs(self.settings.data_dir / "blobs")
        self.app: FastAPI = create_app(ApiServices(self.store, self.blobs, self.settings))

    def key(self, tenant: str = "acme", role: str = "user", **limits: int) -> str:
        """A fresh key's secret."""
        secret = new_secret()
        self.store.add_key(
            ApiKey(
                id=new_id(KEY),
                tenant=tenant,
                name="",
                role=role,
                prefix=secret[:12],
                created_at=self.store.now(),
                limits=limits,
            ),
            secret,
        )
        return secret

    @contextlib.contextmanager
    def client(self, secret: str | None = None) -> Iterator[TestClient]:
        """An in-process client, with a user's key unless told otherwise."""
        bearer = self.key() if secret is None else secret
        headers = {"authorization": f"Bearer {bearer}"} if bearer else {}
        with TestClient(self.app, headers=headers, raise_server_exceptions=False) as client:
            yield client

    @contextlib.contextmanager
    def served(self) -> Iterator[str]:
        """The application on a real port; yields its URL."""
        server = api_server(self.app, self.settings.model_copy(update={"port": 0}))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            wait_until(lambda: server.started, 60)
            port = server.servers[0].sockets[0].getsockname()[1]
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join(60)

    def read_in(self) -> str:
        """Intake of the oldest waiting batch; its id."""
        task = self.store.claim_intake("intake", 30)
        assert task is not None
        with self.blobs.open(task.file.blob_key) as file:
            lines = [_request(number, raw) for number, raw in enumerate(file, 1)]
        self.store.load_lines(task.batch.id, "intake", lines, slice_requests=2)
        return task.batch.id

    def heartbeat(
        self, state: InstanceState = InstanceState.READY, *others: ModelView, **seen: Any
    ) -> None:
        """One instance reports that it hosts MODEL and `others`, and what was `seen` of it."""
        model = ModelView(MODEL, EngineKind.GENERATE, Residency.AWAKE, 2048)
        models = (model, *others)
        self.store.heartbeat(Heartbeat("gpu-0", "boot", "cpu", state, models, 8, 8192, **seen))

    def run(self, answers: Answers = says_yes, *, most: int = 1_000) -> None:
        """Place, claim and answer about `most` queued requests."""
        self.heartbeat()
        epoch = self.store.lead("test", 60)
        assert epoch is not None
        self.store.assign(
            epoch,
            [
                Assignment("gpu-0", run.run_id, run.generation, run.slices, "group")
                for run in self.store.snapshot().runs
            ],
        )
        for held in self.store.claim_slices("gpu-0", "boot", max_requests=most, lease_s=30):
            rows = []
            for request in held.requests:
                status, body = answers(request)
                rows.append(
                    ResultRow(
                        slice_id=held.slice_id,
                        epoch=held.epoch,
                        run_id=request.run_id,
                        position=request.position,
                        generation=held.generation,
                        request_id=f"req_{request.position}",
                        status_code=status,
                        body=json.dumps(body),
                        usage=Usage(10, 4, 5, 2),
                    )
                )
            done = [Held(held.slice_id, held.epoch, complete=True)]
            self.store.flush("gpu-0", rows, done, lease_s=30)

    def write_out(self) -> Batch:
        """Export of the batch whose outcome is settled."""
        task = self.store.claim_export("export", 30)
        assert task is not None
        texts: dict[bool, list[bytes]] = {True: [], False: []}
        for line in self.store.export_lines(task.batch.id):
            ok, text = render_line(line)
            texts[ok].append(text)
        output, errors = (self._output(task.batch, b"".join(texts[ok])) for ok in (True, False))
        ended = self.store.finish_export(task.batch.id, "export", output, errors)
        assert ended is not None
        return ended

    def _output(self, batch: Batch, content: bytes) -> FileRecord | None:
        if not content:
            return None
        file_id = new_id(FILE)
        with self.blobs.create(f"out/{file_id}") as blob:
            blob.write(content)
        return FileRecord(
            id=file_id,
            tenant=batch.spec.tenant,
            purpose=FilePurpose.BATCH_OUTPUT,
            filename=f"{batch.id}.jsonl",
            bytes=len(content),
            sha256="",
            blob_key=f"out/{file_id}",
            created_at=self.store.now(),
        )


def make_site(folder: Path, store: Store | None = None, **settings: Any) -> Site:
    """A site whose data lies in `folder`, over `store` or one in memory, with e-mail on."""
    given = {"smtp_url": "smtp://localhost", **settings}
    return Site(folder, Settings(data_dir=folder / "data", **given), store)


def upload(client: TestClient, content: bytes, **fields: str) -> Json:
    """Upload and return the file object."""
    answer = client.post(
        "/v1/files",
        files={"file": ("input.jsonl", content)},
        data={"purpose": "batch", **fields},
    )
    assert answer.status_code == 200, answer.text
    made: Json = answer.json()
    return made


def submit(client: TestClient, content: bytes, **extra: Any) -> Json:
    """Upload and create a batch; returns the batch object."""
    body = {
        "input_file_id": upload(client, content)["id"],
        "endpoint": CHAT,
        "completion_window": "24h",
        **extra,
    }
    answer = client.post("/v1/batches", json=body)
    assert answer.status_code == 200, answer.text
    made: Json = answer.json()
    return made


def error_of(answer: Any, status: int) -> Mapping[str, Any]:
    """The envelope of an error, whose shape and headers are checked on the way."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error"}
    error: Mapping[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"]
    assert answer.headers["x-request-id"]
    return error


def wait_until(reached: Callable[[], bool], seconds: float = 30) -> None:
    """Return once `reached`; fail after `seconds`."""
    until = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.005)


def _request(number: int, raw: bytes) -> RequestLine:
    line = json.loads(raw)
    return RequestLine(
        line=number,
        custom_id=line["custom_id"],
        model=line["body"]["model"],
        body=json.dumps(line["body"]),
        prompt_tokens=10,
        max_tokens=16,
    )
