"""The fleet at one look, over REST and as `qlm top`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from fastapi.testclient import TestClient

from qlm_batch.control.scheduler_loop import SchedulerConfig, SchedulerLoop
from qlm_batch.domain.interactive import InteractiveMark, InteractiveState, NewInteractive
from qlm_batch.domain.jobs import EngineKind, Usage
from qlm_batch.domain.snapshot import InstanceState, ModelView, Residency
from qlm_batch.scheduling.policies import policy
from qlm_cli.main import cli
from tests.api_support import AT_WORK, CHAT, MODEL, Site, error_of, input_file, make_site, submit


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return make_site(tmp_path)


@pytest.fixture
def client(site: Site) -> Iterator[TestClient]:
    with site.client(site.key(role="admin")) as client:
        yield client


def busy(site: Site, client: TestClient) -> str:
    """An instance in the middle of things, a planned batch, and an answered interactive call."""
    batch = submit(client, input_file("a", "b", "c"))
    site.read_in()
    asleep = ModelView("test/other", EngineKind.GENERATE, Residency.ASLEEP, 2048, wake_s=3.0)
    site.heartbeat(InstanceState.READY, asleep, **AT_WORK, tokens_per_s=55.0)
    loop = SchedulerLoop(site.store, Nobody(), policy("qlm"), SchedulerConfig("test"))
    loop.tick()
    loop.close()
    call = NewInteractive("req_1", "acme", CHAT, MODEL, "{}", True, 1.0, "gpu-0", "boot")
    site.store.add_interactive(call)
    site.store.mark_interactive(
        [
            InteractiveMark(
                "req_1",
                1,
                InteractiveState.DONE,
                200,
                "{}",
                Usage(output_tokens=11),
                first_token_s=0.5,
                duration_s=1.5,
            )
        ]
    )
    return str(batch["id"])


class Nobody:
    """A dispatcher without anyone to tell."""

    def assigned(self, message: object) -> None:
        return

    def stopped(self, message: object) -> None:
        return


def top(site: Site, *options: str, role: str = "admin") -> Result:
    with site.served() as url:
        given = ["top", "--once", "--url", url, "--key", site.key(role=role), *options]
        return CliRunner().invoke(cli, given)


def test_one_look_shows_instances_batches_and_interactive_requests(
    site: Site, client: TestClient
) -> None:
    batch_id = busy(site, client)
    seen = client.get("/v1/fleet").json()
    (instance,) = seen["instances"]
    assert (instance["batch_running"], instance["interactive_running"]) == (5, 2)
    assert (instance["batch_cap"], instance["kv_usage"]) == (6, 0.25)
    assert (instance["evictions"], instance["recomputed_tokens"]) == (4, 90)
    assert [model["residency"] for model in instance["models"]] == ["awake", "asleep"]
    assert instance["assigned_requests"] + sum(group["slices"] for group in instance["queue"]) > 0
    (batch,) = seen["batches"]
    assert (batch["id"], batch["tenant"], batch["total"]) == (batch_id, "acme", 3)
    assert batch["eta"]["p50"] is not None
    assert seen["interactive"]["requests"] == 1
    assert seen["interactive"]["ttft_p50"] == 0.5
    assert seen["interactive"]["tpot_p50"] == pytest.approx(0.1)
    assert seen["interactive"]["met"] == 1.0


@pytest.mark.parametrize("role", ["read", "user"])
def test_only_an_admin_sees_all_tenants(site: Site, role: str) -> None:
    with site.client(site.key(role=role)) as client:
        assert error_of(client.get("/v1/fleet"), 403)["code"] == "insufficient_role"
    assert "needs 'admin'" in str(top(site, role=role).exception)


def test_top_draws_the_fleet_for_people_and_prints_it_for_programs(
    site: Site, client: TestClient
) -> None:
    batch_id = busy(site, client)
    text = top(site).stdout
    for words in ("gpu-0", "5 of 6", "25 %", "asleep, 3 s to wake", batch_id, "500 ms"):
        assert words in text
    for words in ("3 batch requests waiting or running", "1 interactive request answered", "0/3"):
        assert words in text
    seen = json.loads(top(site, "--json").stdout.splitlines()[-1])
    assert seen["object"] == "fleet"


def test_top_of_an_empty_service_says_so(site: Site) -> None:
    text = top(site).stdout
    assert "no instance has reported yet" in text
    assert "no open batches" in text
