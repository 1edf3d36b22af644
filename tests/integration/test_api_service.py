"""What operators see: health, readiness, metrics, the OpenAPI document and a clean stop."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from qlm_batch.api.server import api_server, run_api
from qlm_batch.domain.errors import ConfigurationError, Unavailable
from qlm_batch.domain.jobs import SloClass
from qlm_batch.domain.snapshot import InstanceState, Latency
from tests.api_support import (
    AT_WORK,
    MODEL,
    Site,
    input_file,
    make_site,
    submit,
    upload,
    wait_until,
)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return make_site(tmp_path)


@pytest.fixture
def client(site: Site) -> Iterator[TestClient]:
    with site.client() as client:
        yield client


@pytest.fixture
def no_database(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*args: object, **kwargs: object) -> None:
        raise Unavailable("The database is away.")

    for name in ("ping", "queue_totals", "instances"):
        monkeypatch.setattr(site.store, name, away)


def test_health_and_readiness_need_no_key(site: Site) -> None:
    with site.client("") as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        assert client.get("/readyz").json() == {"status": "ok"}


@pytest.mark.usefixtures("no_database")
def test_without_a_database_the_service_lives_but_is_not_ready(client: TestClient) -> None:
    assert client.get("/healthz").status_code == 200
    answer = client.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["reasons"] == ["The database is away."]
    assert answer.json()["error"]["code"] == "service_unavailable"
    assert answer.headers["retry-after"]


def test_metrics_count_the_queue_the_fleet_and_requests_by_route(
    site: Site, client: TestClient
) -> None:
    batch = submit(client, input_file("a", "b", "c"))
    site.read_in()
    site.heartbeat()
    client.get(f"/v1/batches/{batch['id']}")
    text = client.get("/metrics").text
    assert "qlm_queue_requests 3.0" in text
    assert 'qlm_instances{state="ready"} 1.0' in text
    assert 'route="/v1/batches/{batch_id}",status="200"' in text
    assert batch["id"] not in text


def test_metrics_count_how_batch_deadlines_held(site: Site, client: TestClient) -> None:
    submit(client, input_file("a", "b"))
    site.read_in()
    site.run()
    site.write_out()
    text = client.get("/metrics").text
    assert 'qlm_slo_total{met="yes",slo_class="batch"} 2.0' in text
    assert 'qlm_slo_total{met="no",slo_class="batch"} 0.0' in text


def test_metrics_tell_what_an_instance_does(site: Site, client: TestClient) -> None:
    site.heartbeat(**AT_WORK, latencies=(Latency(SloClass.BATCH).after(0.5, 2.5, 11),))
    text = client.get("/metrics").text
    for told in (
        "interactive_running 2.0",
        "batch_running 5.0",
        "batch_cap 6.0",
        "evictions_total 4.0",
        "recomputed_tokens_total 90.0",
        "output_tokens_total 1234.0",
        "kv_usage 0.25",
    ):
        name, value = told.split()
        assert f'qlm_instance_{name}{{instance="gpu-0"}} {value}' in text
    where = '{instance="gpu-0",slo_class="batch"}'
    assert f"qlm_instance_first_token_seconds_sum{where} 0.5" in text
    assert f"qlm_instance_seconds_per_token_count{where} 10.0" in text
    assert f"qlm_instance_seconds_per_token_sum{where} 2.0" in text


@pytest.mark.usefixtures("no_database")
def test_metrics_go_on_without_a_database(client: TestClient) -> None:
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert "qlm_database_up 0.0" in answer.text


def test_a_model_is_listed_once_its_instance_is_up(site: Site, client: TestClient) -> None:
    site.heartbeat(InstanceState.STARTING)
    assert not client.get("/v1/models").json()["data"]
    site.heartbeat()
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == MODEL
    assert model["qlm"] == {"kind": "generate", "max_model_len": 2048, "instances": ["gpu-0"]}
    assert client.get(f"/v1/models/{MODEL}").json() == model


def test_the_document_names_every_operation_and_its_errors(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    operations = [
        (path, operation)
        for path, methods in document["paths"].items()
        for operation in methods.values()
    ]
    names = [operation["operationId"] for _, operation in operations]
    assert len(names) == len(set(names))
    for path, operation in operations:
        if path.startswith("/v1/"):
            assert operation["security"]
            assert {"400", "401", "403", "429", "500", "503"} <= set(operation["responses"])
            for status, response in operation["responses"].items():
                if status != "200":
                    schema = response["content"]["application/json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/ErrorEnvelope"}
    assert "HTTPValidationError" not in str(document)


def test_answers_have_the_shape_the_document_says(site: Site, client: TestClient) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]

    def fits(made: dict[str, Any], name: str) -> bool:
        return set(made) == set(schemas[name]["properties"])

    batch = submit(client, input_file("a"))
    assert fits(batch, "BatchObject")
    assert fits(batch["qlm"], "BatchExtras")
    assert fits(upload(client, b""), "FileObject")


def test_the_documentation_is_there(client: TestClient) -> None:
    assert client.get("/docs").status_code == 200


def test_a_download_under_way_is_finished_when_the_server_is_told_to_stop(
    site: Site, client: TestClient
) -> None:
    made = upload(client, b"x" * 30_000_000)
    server = api_server(site.app, site.settings.model_copy(update={"port": 0}))
    serving = threading.Thread(target=server.run)
    serving.start()
    wait_until(lambda: server.started, 60)
    port = server.servers[0].sockets[0].getsockname()[1]
    path = f"http://127.0.0.1:{port}/v1/files/{made['id']}/content"
    key = {"authorization": f"Bearer {site.key()}"}
    with httpx.stream("GET", path, headers=key, timeout=60) as answer:
        pieces = answer.iter_raw(65536)
        size = len(next(pieces))
        server.should_exit = True
        size += sum(map(len, pieces))
    serving.join(30)
    assert not serving.is_alive()
    assert size == 30_000_000


def test_a_client_that_takes_nothing_does_not_hold_its_connection(
    site: Site, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlm_batch.api.server.STALL_S", 0.5)
    made = upload(client, b"x" * 30_000_000)
    server = api_server(site.app, site.settings.model_copy(update={"port": 0}))
    serving = threading.Thread(target=server.run)
    serving.start()
    wait_until(lambda: server.started, 60)
    where = server.servers[0].sockets[0].getsockname()
    with socket.create_connection(where) as connection:
        connection.sendall(
            f"GET /v1/files/{made['id']}/content HTTP/1.1\r\nhost: x\r\n"
            f"authorization: Bearer {site.key()}\r\n\r\n".encode()
        )
        # Answered and taken from once: from here on the client takes nothing.
        assert connection.recv(1)
        wait_until(lambda: not server.server_state.connections)
    server.should_exit = True
    serving.join(30)
    assert not serving.is_alive()


def test_idle_connections_are_closed_by_clients_and_not_by_the_server(site: Site) -> None:
    load_balancers_s = 60
    assert api_server(site.app, site.settings).config.timeout_keep_alive > load_balancers_s


def test_sigterm_ends_the_server_and_returns_to_its_caller(site: Site) -> None:
    server = api_server(site.app, site.settings.model_copy(update={"port": 0}))

    def stop_once_up() -> None:
        wait_until(lambda: server.started, 60)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop_once_up)
    stopper.start()
    before = signal.getsignal(signal.SIGTERM)
    server.run()
    stopper.join()
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_address_that_is_taken_is_told_by_its_settings(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match="QLM_PORT"):
            run_api(site.app, site.settings.model_copy(update={"port": port}))
