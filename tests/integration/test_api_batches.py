"""Batches over REST: what clients see in each state, and what goes beyond OpenAI's contract."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from qlm_batch.api.app import create_app
from qlm_batch.api.services import ApiServices
from qlm_batch.domain.errors import Unavailable
from qlm_batch.domain.jobs import ClaimedRequest, DeliveryAttempt, LineError
from qlm_batch.domain.messages import Assigned, Stopped
from tests.api_support import CHAT, MODEL, Site, error_of, input_file, make_site, submit, upload


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return make_site(tmp_path, webhook_allow=("127.0.0.1",))


@pytest.fixture
def client(site: Site) -> Iterator[TestClient]:
    with site.client() as client:
        yield client


def fails(request: ClaimedRequest) -> tuple[int, dict[str, Any]]:
    return 400, {"error": {"message": "no", "type": "t", "param": None, "code": None}}


def test_a_fresh_batch_has_every_field_with_nulls_and_zeros(client: TestClient) -> None:
    batch = submit(client, input_file("a"), completion_window="2h30m")
    now = 1_800_000_000
    assert batch == {
        "id": batch["id"],
        "object": "batch",
        "endpoint": CHAT,
        "model": None,
        "errors": None,
        "input_file_id": batch["input_file_id"],
        "completion_window": "2h30m",
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": now,
        "in_progress_at": None,
        "expires_at": now + 9000,
        "finalizing_at": None,
        "completed_at": None,
        "failed_at": None,
        "expired_at": None,
        "cancelling_at": None,
        "cancelled_at": None,
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "usage": {
            "input_tokens": 0,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 0,
        },
        "metadata": None,
        "qlm": {
            "deadline": now + 9000,
            "eta": {"p50": None, "p95": None},
            "miss_probability": None,
            "reason": None,
            "promise": None,
            "generation": batch["qlm"]["generation"],
            "on_miss": "expire",
            "strict": False,
            "callbacks": {"webhook": None, "email": None},
            "models": [],
            "error_count": 0,
        },
    }
    assert client.get(f"/v1/batches/{batch['id']}").json() == batch


@pytest.mark.parametrize("window", ["10s", "15m", "2h30m", "24h", "7d"])
def test_any_duration_is_a_completion_window(client: TestClient, window: str) -> None:
    assert submit(client, b"", completion_window=window)["completion_window"] == window


def test_everything_asked_for_is_shown_again(client: TestClient) -> None:
    batch = submit(
        client,
        input_file("a"),
        metadata={"team": "one", "": "empty keys are keys"},
        callbacks={"webhook": "http://127.0.0.1:9999/hook", "email": "me@example.org"},
        on_miss="finish_late",
        strict=True,
        output_expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert batch["metadata"] == {"team": "one", "": "empty keys are keys"}
    assert batch["qlm"]["callbacks"] == {
        "webhook": "http://127.0.0.1:9999/hook",
        "email": "me@example.org",
    }
    assert (batch["qlm"]["on_miss"], batch["qlm"]["strict"]) == ("finish_late", True)


def test_each_state_leaves_its_time(site: Site, client: TestClient) -> None:
    made = submit(client, input_file("a", "b"))
    start = site.clock.at

    def seen() -> dict[str, Any]:
        found: dict[str, Any] = client.get(f"/v1/batches/{made['id']}").json()
        return found

    site.clock.at = start + 1
    site.read_in()
    assert seen()["in_progress_at"] == start + 1
    assert seen()["model"] == MODEL
    site.clock.at = start + 2
    site.run()
    assert seen()["status"] == "finalizing"
    assert seen()["finalizing_at"] == start + 2
    assert seen()["completed_at"] is None
    site.clock.at = start + 3
    site.write_out()
    ended = seen()
    assert ended["completed_at"] == start + 3
    assert [ended[f"{end}_at"] for end in ("failed", "expired", "cancelled")] == [None] * 3


def test_a_batch_whose_lines_all_failed_is_completed_without_an_output_file(
    site: Site, client: TestClient
) -> None:
    made = submit(client, input_file("a", "b"))
    site.read_in()
    site.run(fails)
    site.write_out()
    ended = client.get(f"/v1/batches/{made['id']}").json()
    assert ended["status"] == "completed"
    assert ended["output_file_id"] is None
    errors = client.get(f"/v1/files/{ended['error_file_id']}/content").text.splitlines()
    assert len(errors) == ended["request_counts"]["failed"] == 2


def test_a_file_that_fails_validation_shows_its_errors(site: Site, client: TestClient) -> None:
    made = submit(client, b"{")
    task = site.store.claim_intake("intake", 30)
    assert task is not None
    fault = LineError("invalid_json_line", "Line 1 is not JSON.", line=1)
    site.store.fail_intake(made["id"], "intake", [fault], total=7)
    failed = client.get(f"/v1/batches/{made['id']}").json()
    assert failed["status"] == "failed"
    assert failed["failed_at"] is not None
    assert failed["errors"] == {
        "object": "list",
        "data": [
            {
                "code": "invalid_json_line",
                "message": "Line 1 is not JSON.",
                "param": None,
                "line": 1,
            }
        ],
    }
    assert failed["qlm"]["error_count"] == 7


def test_an_output_file_is_no_input(site: Site, client: TestClient) -> None:
    made = submit(client, input_file("a"))
    site.read_in()
    site.run()
    ended = site.write_out()
    body = {
        "input_file_id": ended.output_file_id,
        "endpoint": CHAT,
        "completion_window": "24h",
    }
    assert error_of(client.post("/v1/batches", json=body), 400)["param"] == "input_file_id"
    assert made["id"] == ended.id


def test_an_idempotency_key_replays_even_after_the_file_is_gone(client: TestClient) -> None:
    body = {
        "input_file_id": upload(client, b"{}")["id"],
        "endpoint": CHAT,
        "completion_window": "24h",
    }
    key = {"idempotency-key": "once"}
    first = client.post("/v1/batches", json=body, headers=key).json()
    client.delete(f"/v1/files/{body['input_file_id']}")
    # The same meaning in other words is the same request.
    again = client.post("/v1/batches", json=body | {"on_miss": "expire"}, headers=key)
    assert again.json()["id"] == first["id"]
    answer = client.post("/v1/batches", json=body | {"on_miss": "finish_late"}, headers=key)
    assert "idempotency" in str(error_of(answer, 422)["code"])
    assert len(client.get("/v1/batches").json()["data"]) == 1


@pytest.mark.parametrize("key", ["", "x" * 256, "\x7f"])
def test_a_strange_idempotency_key_is_refused_by_name(client: TestClient, key: str) -> None:
    answer = client.post("/v1/batches", json={}, headers={"idempotency-key": key})
    error_of(answer, 400)


def test_a_page_names_its_first_and_last_object(client: TestClient) -> None:
    made = [submit(client, b"")["id"] for _ in range(3)][::-1]
    page = client.get("/v1/batches?limit=2").json()
    assert (page["object"], page["has_more"]) == ("list", True)
    assert [page["first_id"], page["last_id"]] == made[:2]
    rest = client.get(f"/v1/batches?limit=2&after={page['last_id']}").json()
    assert [batch["id"] for batch in rest["data"]] == made[2:]
    assert rest["has_more"] is False
    empty = client.get(f"/v1/batches?after={made[-1]}").json()
    assert (empty["data"], empty["first_id"], empty["last_id"]) == ([], None, None)


@pytest.mark.parametrize("path", ["/v1/batches", "/v1/files"])
def test_a_page_after_nothing_is_the_first(client: TestClient, path: str) -> None:
    submit(client, b"")
    first = client.get(path).json()
    assert first["data"]
    assert client.get(path, params={"after": ""}).json() == first


def test_a_page_has_twenty_batches_unless_asked_otherwise(client: TestClient) -> None:
    body = {
        "input_file_id": upload(client, b"{}")["id"],
        "endpoint": CHAT,
        "completion_window": "24h",
    }
    for _ in range(21):
        client.post("/v1/batches", json=body)
    assert len(client.get("/v1/batches").json()["data"]) == 20
    assert len(client.get("/v1/batches?limit=100").json()["data"]) == 21


def test_results_are_there_while_the_batch_runs(site: Site, client: TestClient) -> None:
    made = submit(client, input_file("a", "b", "c", "d"))
    path = f"/v1/batches/{made['id']}/results"
    assert client.get(f"{path}?partial=true").text == ""
    site.read_in()
    site.run(most=2)
    answer = client.get(f"{path}?partial=true")
    assert answer.headers["content-type"].startswith("application/jsonl")
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert [line["custom_id"] for line in lines] == ["a", "b"]
    assert lines[0]["response"]["body"]["object"] == "chat.completion"
    refused = error_of(client.get(path), 409)
    assert "partial=true" in refused["message"]


def test_results_of_an_ended_batch_account_for_every_line(site: Site, client: TestClient) -> None:
    made = submit(client, input_file("a", "b", "c", "d"))
    site.read_in()
    site.run(fails, most=2)
    client.post(f"/v1/batches/{made['id']}/cancel")
    site.write_out()
    lines = client.get(f"/v1/batches/{made['id']}/results").text.splitlines()
    outcomes = {line["custom_id"]: line["error"] for line in map(json.loads, lines)}
    assert outcomes["a"] is None
    assert outcomes["d"]["code"] == "batch_cancelled"
    assert set(outcomes) == {"a", "b", "c", "d"}


def test_a_retry_runs_the_failed_lines_in_the_next_generation(
    site: Site, client: TestClient
) -> None:
    made = submit(client, input_file("a", "b", "c"))
    site.read_in()
    error_of(client.post(f"/v1/batches/{made['id']}/retry"), 409)
    site.run(lambda request: (500, {}) if request.position else (200, {"first": True}))
    site.write_out()
    retried = client.post(
        f"/v1/batches/{made['id']}/retry", json={"completion_window": "1h"}
    ).json()
    assert retried["status"] == "in_progress"
    assert retried["qlm"]["generation"] == made["qlm"]["generation"] + 1
    assert retried["expires_at"] == site.clock.at + 3600
    site.run(lambda request: (200, {"first": False}))
    site.write_out()
    ended = client.get(f"/v1/batches/{made['id']}").json()
    assert ended["request_counts"] == {"total": 3, "completed": 3, "failed": 0}
    text = client.get(f"/v1/batches/{made['id']}/results").text
    assert [json.loads(line)["response"]["body"]["first"] for line in text.splitlines()] == [
        True,
        False,
        False,
    ]
    error_of(client.post(f"/v1/batches/{made['id']}/retry"), 409)


def test_a_bad_retry_window_is_refused_by_name(site: Site, client: TestClient) -> None:
    made = submit(client, input_file("a"))
    answer = client.post(f"/v1/batches/{made['id']}/retry", json={"completion_window": "soon"})
    assert error_of(answer, 400)["param"] == "completion_window"
    answer = client.post(f"/v1/batches/{made['id']}/retry", json={"window": "1h"})
    assert error_of(answer, 400)["param"] == "window"


def test_the_log_of_deliveries_and_decisions_is_a_list(client: TestClient) -> None:
    made = submit(client, input_file("a"))
    for name in ("deliveries", "decisions"):
        page = client.get(f"/v1/batches/{made['id']}/{name}").json()
        assert page["object"] == "list"
        assert page["has_more"] is False


def test_dead_letters_are_listed_and_replayed(site: Site, client: TestClient) -> None:
    made = submit(client, input_file("a"), callbacks={"email": "boss@example.org"})
    url = f"/v1/batches/{made['id']}/deliveries"
    site.read_in()
    site.run()
    site.write_out()
    (item,) = site.store.claim_outbox("test", 10, 30)
    site.store.record_delivery(DeliveryAttempt(item.id, False, 550, "no such user", 0.2, None))
    (listed,) = client.get(url).json()["data"]
    assert (listed["ok"], listed["status_code"], listed["retry_at"]) == (False, 550, None)
    assert listed["at"] == site.clock.at
    assert not site.store.claim_outbox("test", 10, 30)
    assert client.post(f"{url}/replay").json() == {"object": "batch.replay", "replayed": 1}
    (again,) = site.store.claim_outbox("test", 10, 30)
    assert again.event_id == item.event_id
    assert client.post(f"{url}/replay").json()["replayed"] == 0


class Hints:
    """A dispatcher that remembers, or is away."""

    def __init__(self, away: bool) -> None:
        self.away = away
        self.stops: list[str] = []

    def assigned(self, message: Assigned) -> None:
        raise AssertionError("the API assigns nothing")

    def stopped(self, message: Stopped) -> None:
        if self.away:
            raise Unavailable("Redis is away.")
        self.stops.append(message.batch_id)


@pytest.mark.parametrize("away", [False, True])
def test_a_cancel_is_hinted_to_workers_and_stands_without_the_hint(site: Site, away: bool) -> None:
    hints = Hints(away)
    app = create_app(ApiServices(site.store, site.blobs, site.settings, hints))
    headers = {"authorization": f"Bearer {site.key()}"}
    with TestClient(app, headers=headers) as client:
        made = submit(client, input_file("a"))
        site.read_in()
        assert client.post(f"/v1/batches/{made['id']}/cancel").json()["status"] == "cancelling"
        assert hints.stops == ([] if away else [made["id"]])
