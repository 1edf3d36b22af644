"""Keys: who may call, for what, and how often."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.api_support import (
    CHAT,
    Clock,
    Site,
    error_of,
    input_file,
    make_site,
    submit,
    upload,
)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return make_site(tmp_path)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time by which keys are remembered and rates held; it stands still."""
    clock = Clock()
    monkeypatch.setattr("qlm_batch.api.auth.time", SimpleNamespace(monotonic=clock))
    return clock


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Basic abc", "Bearer sk-qlm-none", "Bearer \xff", "sk-qlm"]
)
def test_without_a_good_key_every_call_is_a_401(site: Site, header: str) -> None:
    with site.client("") as client:
        headers = {"authorization": header.encode("latin-1")} if header else {}
        for path in ("/v1/files", "/v1/batches", "/v1/models", "/v1/files/x/content"):
            answer = client.get(path, headers=headers)
            assert error_of(answer, 401)["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"


def test_a_revoked_key_stops_working_within_seconds(site: Site, clock: Clock) -> None:
    with site.client() as client:
        assert client.get("/v1/batches").status_code == 200
        (key,) = site.store.list_keys()
        site.store.revoke_key(key.id)
        clock.at += 3.0
        assert client.get("/v1/batches").status_code == 401


def test_another_tenants_objects_do_not_exist(site: Site) -> None:
    with site.client(site.key("one")) as one, site.client(site.key("two")) as two:
        batch = submit(one, input_file("a"))
        file_id = batch["input_file_id"]
        for path in (
            f"/v1/files/{file_id}",
            f"/v1/files/{file_id}/content",
            f"/v1/batches/{batch['id']}",
            f"/v1/batches/{batch['id']}/results?partial=true",
            f"/v1/batches/{batch['id']}/deliveries",
            f"/v1/batches/{batch['id']}/decisions",
        ):
            error_of(two.get(path), 404)
        for path in ("cancel", "retry", "deliveries/replay"):
            error_of(two.post(f"/v1/batches/{batch['id']}/{path}"), 404)
        error_of(two.delete(f"/v1/files/{file_id}"), 404)
        stolen = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
        error_of(two.post("/v1/batches", json=stolen), 404)
        error_of(two.get(f"/v1/batches?after={batch['id']}"), 400)
        error_of(two.get(f"/v1/files?after={file_id}"), 400)
        assert not two.get("/v1/files").json()["data"]
        assert not two.get("/v1/batches").json()["data"]
        assert one.get(f"/v1/batches/{batch['id']}").json()["status"] == "validating"


def test_no_operation_of_the_document_finds_another_tenants_id(site: Site) -> None:
    with site.client(site.key("one")) as one, site.client(site.key("two", role="admin")) as two:
        batch = submit(one, input_file("a"))
        ids = {"{batch_id}": batch["id"], "{file_id}": batch["input_file_id"]}
        tried = 0
        for path, operations in one.get("/openapi.json").json()["paths"].items():
            for name, known in ids.items():
                if name not in path:
                    continue
                for method, operation in operations.items():
                    asked = {
                        each["name"]: "x"
                        for each in operation.get("parameters", ())
                        if each["in"] == "query" and each.get("required")
                    }
                    url = path.replace(name, known)
                    error_of(two.request(method.upper(), url, params=asked), 404)
                    tried += 1
        assert tried >= 10


def test_an_idempotency_key_belongs_to_its_tenant(site: Site) -> None:
    made = set()
    for tenant in ("one", "two"):
        with site.client(site.key(tenant)) as client:
            client.headers["idempotency-key"] = "same"
            made.add(submit(client, input_file("a"))["id"])
    assert len(made) == 2


def test_a_read_key_reads_and_changes_nothing(site: Site) -> None:
    with site.client() as user:
        batch = submit(user, input_file("a"))
    with site.client(site.key(role="read")) as reader:
        assert reader.get(f"/v1/batches/{batch['id']}").status_code == 200
        assert reader.get(f"/v1/files/{batch['input_file_id']}/content").status_code == 200
        for answer in (
            reader.post(f"/v1/batches/{batch['id']}/cancel"),
            reader.post(f"/v1/batches/{batch['id']}/retry"),
            reader.delete(f"/v1/files/{batch['input_file_id']}"),
            reader.post("/v1/files", files={"file": b"x"}, data={"purpose": "batch"}),
        ):
            assert error_of(answer, 403)["code"] == "insufficient_role"


def test_only_an_admin_makes_the_webhook_secret_and_sees_it_once(site: Site) -> None:
    with site.client(site.key(role="user")) as user:
        error_of(user.post("/v1/webhooks/secret/rotate"), 403)
    with site.client(site.key(role="admin")) as admin:
        first = admin.post("/v1/webhooks/secret/rotate").json()["secret"]
        assert first.startswith("whsec_")
        fresh = admin.post("/v1/webhooks/secret/rotate").json()["secret"]
        assert fresh != first
        shown = "".join(
            admin.get(path).text
            for path in ("/v1/webhooks/secret", "/v1/webhooks/secret/rotate", "/openapi.json")
        )
        assert "whsec_" not in shown
    assert list(site.store.webhook_secrets("acme")) == [fresh, first]


@pytest.mark.usefixtures("clock")
def test_a_key_with_a_rate_is_told_what_is_left_and_when_to_come_back(site: Site) -> None:
    with site.client(site.key(requests_per_minute=2)) as client:
        first = client.get("/v1/batches")
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert first.headers["x-ratelimit-reset-requests"].endswith("s")
        assert client.get("/v1/batches").status_code == 200
        refused = client.get("/v1/batches")
        assert error_of(refused, 429)["type"] == "rate_limit_error"
        assert 1 <= int(refused.headers["retry-after"]) <= 31
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"


def test_a_keys_rate_holds_over_all_processes(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A server that is slow on a busy machine is not away.
    monkeypatch.setattr("qlm_batch.dispatch.rates.TIMEOUT_S", 30.0)
    one = make_site(tmp_path / "one", redis_url=redis_url)
    other = make_site(tmp_path / "other", one.store, redis_url=redis_url)
    key = one.key(requests_per_minute=3)
    with one.client(key) as first, other.client(key) as second:
        statuses = [each.get("/v1/batches").status_code for each in (first, second) * 3]
        assert sorted(statuses) == [200] * 3 + [429] * 3
        refused = second.get("/v1/batches")
        assert 1 <= int(refused.headers["retry-after"]) <= 21


@pytest.mark.usefixtures("clock")
def test_without_redis_a_keys_rate_holds_in_each_process(tmp_path: Path) -> None:
    site = make_site(tmp_path, redis_url="redis://127.0.0.1:1/0")
    with site.client(site.key(requests_per_minute=1)) as client:
        assert client.get("/v1/batches").status_code == 200
        error_of(client.get("/v1/batches"), 429)


def test_a_tenant_with_too_much_queued_may_not_add_more(site: Site) -> None:
    with site.client(site.key(queued_requests=2)) as client:
        submit(client, input_file("a", "b"))
        site.read_in()
        body = {
            "input_file_id": upload(client, input_file("c"))["id"],
            "endpoint": CHAT,
            "completion_window": "24h",
        }
        refused = client.post("/v1/batches", json=body)
        assert error_of(refused, 429)["code"] == "queued_requests_exceeded"
        assert refused.headers["retry-after"]
        site.run()
        assert client.post("/v1/batches", json=body).status_code == 200


def test_a_tenant_with_too_many_tokens_queued_may_not_add_more(site: Site) -> None:
    with site.client(site.key(queued_tokens=52)) as client:
        for name, allowed in (("a", 200), ("b", 200), ("c", 429)):
            body = {
                "input_file_id": upload(client, input_file(name))["id"],
                "endpoint": CHAT,
                "completion_window": "24h",
            }
            answer = client.post("/v1/batches", json=body)
            assert answer.status_code == allowed
            if allowed == 200:
                site.read_in()
        assert error_of(answer, 429)["code"] == "queued_tokens_exceeded"
        assert answer.headers["retry-after"]


def test_who_has_no_key_learns_nothing_about_a_body(site: Site) -> None:
    with site.client("") as client:
        for body in ("{", "[]", '{"unknown": 1}', "x" * 2_000_000):
            for headers in ({}, {"authorization": "Bearer sk-qlm-none"}):
                answer = client.post(
                    "/v1/batches",
                    content=body,
                    headers={"content-type": "application/json", **headers},
                )
                assert error_of(answer, 401)["code"] == "invalid_api_key"


def test_email_is_refused_where_the_service_sends_none(tmp_path: Path) -> None:
    with make_site(tmp_path, smtp_url="").client() as client:
        body = {
            "input_file_id": upload(client, input_file("a"))["id"],
            "endpoint": CHAT,
            "completion_window": "24h",
            "callbacks": {"email": "me@example.org"},
        }
        error = error_of(client.post("/v1/batches", json=body), 400)
        assert (error["code"], error["param"]) == ("email_off", "callbacks.email")
        assert "QLM_SMTP_URL" in error["message"]


def test_email_goes_only_where_the_tenant_may_send_it(tmp_path: Path) -> None:
    site = make_site(
        tmp_path, email_allow={"acme": ("@acme.example", "boss@other.example"), "*": ()}
    )
    with site.client(site.key("acme")) as client:
        for address in ("any@ACME.example", "boss@other.example"):
            batch = submit(client, input_file("a"), callbacks={"email": address})
            assert batch["qlm"]["callbacks"] == {"webhook": None, "email": address}
        for address in ("x@other.example", "x@sub.acme.example", "x@acme.example.evil.example"):
            body = {
                "input_file_id": batch["input_file_id"],
                "endpoint": CHAT,
                "completion_window": "24h",
                "callbacks": {"email": address},
            }
            error = error_of(client.post("/v1/batches", json=body), 400)
            assert (error["code"], error["param"]) == ("email_not_allowed", "callbacks.email")
    with site.client(site.key("other")) as client:
        error_of(client.post("/v1/batches", json=body), 400)
