"""Estimates before submitting and the reliability of promises, over REST and by command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from fastapi.testclient import TestClient

from qlm_batch.control.scheduler_loop import SchedulerConfig, SchedulerLoop
from qlm_batch.domain.interactive import InteractiveMark, InteractiveState, NewInteractive
from qlm_batch.domain.jobs import Usage
from qlm_batch.domain.messages import Assigned, Stopped
from qlm_batch.scheduling.policies import policy
from qlm_cli.main import cli
from tests.api_support import CHAT, MODEL, Site, error_of, input_file, make_site, submit


class Nobody:
    """A dispatcher without anyone to tell."""

    def assigned(self, message: Assigned) -> None:
        return

    def stopped(self, message: Stopped) -> None:
        return


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return make_site(tmp_path)


@pytest.fixture
def client(site: Site) -> Iterator[TestClient]:
    with site.client() as client:
        yield client


def ask(window: str, requests: int = 10, model: str = MODEL) -> dict[str, Any]:
    work = {"model": model, "requests": requests, "prompt_tokens": 100 * requests}
    return {"completion_window": window, "work": [{**work, "max_tokens": 128 * requests}]}


def planned(site: Site, client: TestClient, **extra: str) -> str:
    """A batch planned by the real loop."""
    batch = submit(client, input_file("a", "b"), **extra)
    site.read_in()
    site.heartbeat()
    loop = SchedulerLoop(site.store, Nobody(), policy("qlm"), SchedulerConfig("test"))  # type: ignore[arg-type]
    loop.tick()
    loop.close()
    return str(batch["id"])


def ran(site: Site, client: TestClient) -> str:
    """A batch planned by the real loop and run to its end."""
    batch_id = planned(site, client)
    site.clock.at += 1.0
    site.run()
    site.write_out()
    return batch_id


def run_cli(site: Site, *arguments: str) -> Result:
    with site.served() as url:
        return CliRunner().invoke(
            cli, [*arguments, "--url", url, "--key", site.key()], catch_exceptions=False
        )


def last_line(result: Result) -> Any:
    """The command's JSON; the service under test logs to the same stream."""
    return json.loads(result.stdout.splitlines()[-1])


def test_an_estimate_says_when_and_whether(site: Site, client: TestClient) -> None:
    site.heartbeat()
    answer = client.post("/v1/estimates", json=ask("24h")).json()
    assert answer["verdict"] == "accept"
    assert 1_800_000_000 <= answer["eta"]["p50"] <= answer["eta"]["p95"] < answer["deadline"]
    assert answer["miss_probability"] < 0.05
    late = client.post("/v1/estimates", json=ask("10s", 1_000_000)).json()
    assert late["verdict"] == "refuse"
    assert late["earliest_window_s"] > 10


def test_an_estimate_stores_nothing(site: Site, client: TestClient) -> None:
    site.heartbeat()
    client.post("/v1/estimates", json=ask("24h"))
    assert site.store.snapshot().runs == ()
    assert client.get("/v1/batches").json()["data"] == []


def test_an_estimate_for_a_model_nobody_serves_is_a_refusal_with_a_reason(
    site: Site, client: TestClient
) -> None:
    answer = client.post("/v1/estimates", json=ask("24h", model="absent")).json()
    assert answer["verdict"] == "refuse"
    assert answer["eta"] == {"p50": None, "p95": None}
    assert "absent" in answer["reason"]


def test_a_bad_window_is_named(client: TestClient) -> None:
    error = error_of(client.post("/v1/estimates", json=ask("soon")), 400)
    assert error["param"] == "completion_window"


def test_more_unbounded_requests_than_there_may_be_are_refused_by_name(
    site: Site, client: TestClient
) -> None:
    site.heartbeat()
    asked = ask("24h")
    asked["work"][0]["unbounded"] = 10**15
    assert "unbounded" in error_of(client.post("/v1/estimates", json=asked), 400)["param"]


def test_calibration_is_empty_until_a_batch_has_ended(site: Site, client: TestClient) -> None:
    assert client.get("/v1/calibration").json()["promises"] == 0
    ran(site, client)
    found = client.get("/v1/calibration").json()
    assert found["promises"] == 1
    (receipt,) = found["receipts"]
    assert receipt["actual_s"] == 1.0
    assert found["done_by_p95"] == float(receipt["p95_s"] >= 1.0)


def test_the_command_line_estimates_a_file(site: Site, tmp_path: Path) -> None:
    site.heartbeat()
    path = tmp_path / "in.jsonl"
    path.write_bytes(input_file("a", "b"))
    result = run_cli(site, "estimate", str(path), "--json")
    assert result.exit_code == 0, result.output
    assert last_line(result)["verdict"] == "accept"
    assert "would be in time" in run_cli(site, "estimate", str(path)).stdout


def test_an_estimate_that_it_would_be_late_ends_with_a_status_of_its_own(
    site: Site, tmp_path: Path
) -> None:
    site.heartbeat()
    path = tmp_path / "in.jsonl"
    path.write_bytes(input_file(*(f"line-{n}" for n in range(20_000))))
    late = run_cli(site, "estimate", str(path), "--window", "10s")
    assert late.exit_code == 3
    assert "refuse: would not be in time" in late.stdout
    assert "would hold --window" in late.stdout


def test_the_command_line_tells_a_batchs_story(site: Site, client: TestClient) -> None:
    batch_id = ran(site, client)
    text = run_cli(site, "explain", batch_id).stdout
    assert "planned" in text and "promised" in text and "took 1 s" in text
    story = last_line(run_cli(site, "explain", batch_id, "--json"))
    assert story["outcome"]["actual_s"] == 1


def test_a_batch_that_expired_is_not_said_to_have_taken_so_long(
    site: Site, client: TestClient
) -> None:
    batch_id = planned(site, client, completion_window="10s")
    site.clock.at += 11.0
    epoch = site.store.lead("test", 60)
    assert epoch is not None
    site.store.reap(epoch)
    site.write_out()
    text = run_cli(site, "explain", batch_id).stdout
    assert "expired after 11 s" in text and "took" not in text


def test_the_command_line_tells_the_story_of_one_request(site: Site, client: TestClient) -> None:
    batch_id = ran(site, client)
    text = run_cli(site, "explain", batch_id, "b").stdout
    assert "line 2 (b)" in text and "answered with status 200" in text
    assert "planned" in text and "took 1 s" in text
    told = last_line(run_cli(site, "explain", batch_id, "b", "--json"))["request"]
    assert (told["custom_id"], told["state"]) == ("b", "done")
    missing = client.get(f"/v1/batches/{batch_id}/story", params={"custom_id": "c"})
    assert "no line with the custom_id 'c'" in error_of(missing, 404)["message"]


def test_an_interactive_call_is_found_by_its_answers_id(site: Site, client: TestClient) -> None:
    site.heartbeat()
    site.store.add_interactive(
        NewInteractive("req_0a", "acme", CHAT, MODEL, "{}", False, 2.0, "gpu-0", "boot")
    )
    mark = InteractiveMark(
        "req_0a", 1, InteractiveState.DONE, 200, "{}", Usage(3, 0, 7), first_token_s=0.5,
        duration_s=0.75,
    )  # fmt: skip
    site.store.mark_interactive([mark])
    found = client.get("/v1/requests/chatcmpl-req_0a").json()
    assert (found["state"], found["first_token_s"], found["ttft_target_s"]) == ("done", 0.5, 2.0)
    text = run_cli(site, "explain", "req_0a").stdout
    assert "promised within 2 s: kept" in text and "7 tokens" in text
    assert client.get("/v1/requests/req_ff").status_code == 404


def test_the_command_line_draws_the_reliability_diagram(site: Site, client: TestClient) -> None:
    assert "no batch has ended" in run_cli(site, "calibration").stdout
    ran(site, client)
    text = run_cli(site, "calibration").stdout
    assert "promises to 1 ended batch; too few to tell" in text and "95 %" in text
