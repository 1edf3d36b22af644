"""`qlm keys` makes keys whose roles and limits the API then holds to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cryptography.fernet import Fernet

from qlm_batch.store.postgres import PostgresStore
from qlm_cli.main import cli
from tests.api_support import (
    CHAT,
    Site,
    error_of,
    input_file,
    make_site,
    submit,
    upload,
    wait_until,
)

Keys = Callable[..., Any]


@pytest.fixture
def site(tmp_path: Path, postgres_url: str) -> Iterator[Site]:
    """The API over a real database."""
    store = PostgresStore(postgres_url, secret_key=Fernet.generate_key())
    yield make_site(tmp_path, store)
    store.close()


@pytest.fixture
def keys(postgres_url: str, tmp_path: Path) -> Keys:
    """Runs `qlm keys … --json` and returns what it says."""
    environment = {
        "DATABASE_URL": postgres_url,
        "QLM_SECRET_KEY": "a key for tests",
        "HOME": str(tmp_path),
    }

    def run(*arguments: str) -> Any:
        done = CliRunner().invoke(cli, ["keys", *arguments, "--json"], env=environment)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return json.loads(done.stdout) if done.exit_code == 0 else done.output

    return run


def test_a_key_made_at_the_command_line_opens_the_api_until_it_is_revoked(
    site: Site, keys: Keys
) -> None:
    made = keys("create", "--tenant", "acme", "--name", "ada")
    assert (made["tenant"], made["role"], made["name"]) == ("acme", "user", "ada")
    with site.client(made["key"]) as client:
        assert client.get("/v1/batches").status_code == 200
        keys("revoke", made["id"])
        wait_until(lambda: client.get("/v1/batches").status_code == 401, seconds=10)


def test_keys_are_listed_by_tenant_without_their_secrets(keys: Keys) -> None:
    one = keys("create", "--tenant", "one")
    keys("create", "--tenant", "two", "--role", "admin")
    listed = json.dumps(keys("list", "--tenant", "one"))
    assert one["id"] in listed and "two" not in listed
    assert one["key"] not in listed


@pytest.mark.parametrize(
    ("role", "reads", "writes", "administers"),
    [("read", 200, 403, 403), ("user", 200, 200, 403), ("admin", 200, 200, 200)],
)
def test_a_role_opens_what_it_names(
    site: Site, keys: Keys, role: str, reads: int, writes: int, administers: int
) -> None:
    with site.client(keys("create", "--tenant", "acme", "--role", role)["key"]) as client:
        assert client.get("/v1/files").status_code == reads
        made = client.post("/v1/files", files={"file": b"{}"}, data={"purpose": "batch"})
        assert made.status_code == writes
        assert client.post("/v1/webhooks/secret/rotate").status_code == administers


def test_limits_given_at_the_command_line_are_kept(site: Site, keys: Keys) -> None:
    limited = keys(
        "create", "--tenant", "acme", "--limit", "queued_requests=2", "--limit", "queued_tokens=40"
    )
    slow = keys("create", "--tenant", "other", "--limit", "requests_per_minute=1")
    with site.client(limited["key"]) as client:
        submit(client, input_file("a", "b"))
        site.read_in()
        body = {
            "input_file_id": upload(client, input_file("c"))["id"],
            "endpoint": CHAT,
            "completion_window": "24h",
        }
        refused = error_of(client.post("/v1/batches", json=body), 429)
        assert refused["code"] == "queued_requests_exceeded"
    with site.client(slow["key"]) as client:
        first = client.get("/v1/batches")
        assert first.headers["x-ratelimit-limit-requests"] == "1"
        assert first.headers["x-ratelimit-remaining-requests"] == "0"
        assert client.get("/v1/batches").status_code == 429


@pytest.mark.parametrize("limit", ["requests=5", "queued_requests", "queued_tokens=-1", "=3"])
def test_a_limit_that_does_not_exist_is_refused_by_name(keys: Keys, limit: str) -> None:
    said = keys("create", "--limit", limit)
    assert "requests_per_minute=NUMBER" in said
