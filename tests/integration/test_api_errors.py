"""Every error has the envelope with four keys, whatever went wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from structlog.testing import capture_logs

from qlm_batch.api.edge import MAX_BODY_BYTES
from qlm_batch.domain.errors import Unavailable
from tests.api_support import CHAT, Site, error_of, make_site, upload


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return make_site(tmp_path)


@pytest.fixture
def client(site: Site) -> Iterator[TestClient]:
    with site.client() as client:
        yield client


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/nothing", "/v1/files/", "/v2/files", "/v1/%00"])
def test_an_unknown_path_is_a_404(client: TestClient, path: str) -> None:
    assert error_of(client.get(path), 404)["code"] == "unknown_url"


@pytest.mark.parametrize(
    ("path", "allowed"), [("/v1/files/file-1", "DELETE, GET"), ("/v1/batches", "GET, POST")]
)
def test_a_method_that_is_not_allowed_is_a_405_naming_those_that_are(
    client: TestClient, path: str, allowed: str
) -> None:
    answer = client.put(path)
    assert error_of(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["allow"] == allowed


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ("{", None, "invalid_json"),
        ("", None, "invalid_body"),
        ("[]", None, "invalid_body"),
        ("null", None, "invalid_body"),
        ("[" * 100_000, None, "invalid_json"),
        ("1" * 10_000, None, "invalid_json"),
        ("{}", "input_file_id", "missing_required_parameter"),
        ('{"input_file_id": 5}', "input_file_id", "invalid_value"),
    ],
)
def test_a_body_that_cannot_be_read_is_a_400(
    client: TestClient, body: str, param: str | None, code: str
) -> None:
    answer = client.post("/v1/batches", content=body, headers={"content-type": "application/json"})
    error = error_of(answer, 400)
    assert (error["param"], error["code"]) == (param, code)


def test_bytes_that_are_not_utf8_are_a_400(client: TestClient) -> None:
    answer = client.post(
        "/v1/batches", content=b'{"a": "\xff"}', headers={"content-type": "application/json"}
    )
    assert error_of(answer, 400)["code"] == "invalid_json"


def test_a_body_without_its_content_type_is_a_400_that_says_so(client: TestClient) -> None:
    answer = client.post("/v1/batches", content=b"{}", headers={"content-type": "text/plain"})
    assert "content-type: application/json" in error_of(answer, 400)["message"]


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_over_a_megabyte_is_a_413(client: TestClient, declared: bool) -> None:
    body = b'{"a": "' + b"x" * MAX_BODY_BYTES + b'"}'
    pieces = iter([body[:100], body[100:]])
    answer = client.post(
        "/v1/batches",
        content=body if declared else pieces,
        headers={"content-type": "application/json"},
    )
    error = error_of(answer, 413)
    assert str(MAX_BODY_BYTES) in error["message"]
    assert error["code"] == "body_too_large"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"endpoint": "/v1/images"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "9s"}, "completion_window"),
        ({"completion_window": "31d"}, "completion_window"),
        ({"completion_window": 24}, "completion_window"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"metadata": {"k": 1}}, "metadata.k"),
        ({"metadata": {"k": "\ud800"}}, "metadata.k"),
        ({"input_file_id": "file-\0"}, "input_file_id"),
        ({"input_file_id": "\udfff"}, "input_file_id"),
        ({"metadata": {"k": "a\0b"}}, "metadata.k"),
        ({"metadata": {str(n): "v" for n in range(17)}}, "metadata"),
        ({"metadata": "text"}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at"}}, "output_expires_after.seconds"),
        (
            {"output_expires_after": {"anchor": "now", "seconds": 3600}},
            "output_expires_after.anchor",
        ),
        (
            {"output_expires_after": {"anchor": "created_at", "seconds": 3599}},
            "output_expires_after.seconds",
        ),
        (
            {"output_expires_after": {"anchor": "created_at", "seconds": 2592001}},
            "output_expires_after.seconds",
        ),
        ({"on_miss": "shrug"}, "on_miss"),
        ({"strict": "true"}, "strict"),
        ({"priority": 5}, "priority"),
        ({"callbacks": {"pager": "x"}}, "callbacks.pager"),
        ({"callbacks": {"webhook": "ftp://example.org/"}}, "callbacks.webhook"),
        ({"callbacks": {"webhook": "not a url"}}, "callbacks.webhook"),
        ({"callbacks": {"webhook": "http://127.0.0.1/hook"}}, "callbacks.webhook"),
        ({"callbacks": {"email": "nobody"}}, "callbacks.email"),
        ({"callbacks": {"email": "a@b.org, c@d.org"}}, "callbacks.email"),
        ({"callbacks": {"email": "a@b.org\r\nBcc: c@d.org"}}, "callbacks.email"),
    ],
)
def test_a_bad_argument_is_a_400_that_names_it(
    client: TestClient, change: dict[str, object], param: str
) -> None:
    body = {
        "input_file_id": upload(client, b"{}")["id"],
        "endpoint": CHAT,
        "completion_window": "24h",
    }
    sent = client.post(
        "/v1/batches",
        content=json.dumps(body | change),
        headers={"content-type": "application/json"},
    )
    error = error_of(sent, 400)
    assert error["param"] == param
    assert not client.get("/v1/batches").json()["data"]


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/v1/batches?limit=0", "limit"),
        ("/v1/batches?limit=101", "limit"),
        ("/v1/batches?limit=many", "limit"),
        ("/v1/files?limit=10001", "limit"),
        ("/v1/files?order=sideways", "order"),
        ("/v1/files?purpose=fun", "purpose"),
        ("/v1/batches?after=batch_none", "after"),
        ("/v1/files?after=file-none", "after"),
    ],
)
def test_a_bad_query_is_a_400_that_names_it(client: TestClient, path: str, param: str) -> None:
    error = error_of(client.get(path), 400)
    assert error["param"] == param
    assert error["code"]


@pytest.mark.parametrize(
    "path",
    [
        "/v1/files/none",
        "/v1/files/%00",
        "/v1/files/none/content",
        "/v1/files/" + "x" * 5_000,
        "/v1/batches/none",
        "/v1/batches/%ff%00",
        "/v1/batches/none/results?partial=true",
        "/v1/batches/none/deliveries",
        "/v1/batches/none/decisions",
        "/v1/models/none",
    ],
)
def test_an_unknown_id_is_a_404(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert error_of(answer, 404)["type"] == "invalid_request_error"
    assert answer.headers["x-should-retry"] == "false"


def test_a_missing_input_file_is_a_404_that_names_the_field(client: TestClient) -> None:
    body = {"input_file_id": "file-none", "endpoint": CHAT, "completion_window": "24h"}
    assert error_of(client.post("/v1/batches", json=body), 404)["param"] == "input_file_id"


def test_a_fault_of_the_service_is_a_500_that_tells_nothing(
    site: Site, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("password=hunter2")

    monkeypatch.setattr(site.store, "list_batches", broken)
    answer = client.get("/v1/batches", headers={"x-request-id": "mine-1"})
    assert error_of(answer, 500)["code"] == "internal_error"
    assert "hunter2" not in answer.text
    assert answer.headers["x-request-id"] == "mine-1"


def test_an_unreachable_database_is_a_503_with_a_time_to_retry(
    site: Site, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*args: object, **kwargs: object) -> None:
        raise Unavailable("The database is away.", why="no password for qlm")

    monkeypatch.setattr(site.store, "list_batches", away)
    with capture_logs() as logs:
        answer = client.get("/v1/batches")
        client.get("/v1/batches")
    assert str(logs).count("no password for qlm") == 1
    assert "no password for qlm" not in answer.text
    assert error_of(answer, 503)["code"] == "service_unavailable"
    assert int(answer.headers["retry-after"]) > 0
    assert "x-should-retry" not in answer.headers


@pytest.mark.parametrize("offered", ["a" * 129, "with space", "x\xe9", ""])
def test_a_strange_request_id_is_replaced(client: TestClient, offered: str) -> None:
    answer = client.get("/healthz", headers={"x-request-id": offered.encode("latin-1")})
    assert answer.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize("path", ["/healthz", "/v1/batches", "/v1/nothing"])
def test_every_response_tells_how_long_it_took(client: TestClient, path: str) -> None:
    before = time.perf_counter()
    told = int(client.get(path).headers["openai-processing-ms"])
    assert 0 <= told <= (time.perf_counter() - before) * 1000 + 1


def test_two_requests_have_different_ids(client: TestClient) -> None:
    first, second = (client.get("/healthz").headers["x-request-id"] for _ in range(2))
    assert first != second
