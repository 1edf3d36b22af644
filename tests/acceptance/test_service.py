"""The whole job on real parts, by the official client and the command line."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from openai import OpenAI
from openai.types import Batch

from qlm_batch.models.prompts import chat_body, is_right, mixed
from qlm_batch.simulation.replay import replay

from .conftest import CHECKOUT, RunningService

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ENDED = ("completed", "failed", "expired", "cancelled")


@pytest.fixture
def client(service: RunningService) -> OpenAI:
    """The official client, with nothing but an address and a key."""
    return OpenAI(base_url=service.url, api_key=service.key, max_retries=0)


def _ended(client: OpenAI, batch_id: str, timeout_s: float = 120) -> Batch:
    deadline = time.monotonic() + timeout_s
    while (batch := client.batches.retrieve(batch_id)).status not in ENDED:
        assert time.monotonic() < deadline, f"still {batch.status}: {batch.request_counts}"
        time.sleep(0.2)
    return batch


def _file(path: Path, lines: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_file_of_questions_comes_back_answered(client: OpenAI, tmp_path: Path) -> None:
    prompts = {f"q{n}": prompt for n, prompt in enumerate(mixed(60, seed=11))}
    path = _file(
        tmp_path / "questions.jsonl",
        [
            {
                "custom_id": name,
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": chat_body(prompt),
            }
            for name, prompt in prompts.items()
        ],
    )
    file = client.files.create(file=path, purpose="batch")
    client.files.wait_for_processing(file.id)
    created = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    batch = _ended(client, created.id)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (60, 0)
    assert batch.usage is not None and batch.usage.output_tokens > 60
    assert batch.output_file_id is not None and batch.error_file_id is None
    rows = [
        json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()
    ]
    assert {row["custom_id"] for row in rows} == set(prompts)
    right = sum(
        is_right(
            prompts[row["custom_id"]],
            row["response"]["body"]["choices"][0]["message"]["content"],
        )
        for row in rows
    )
    assert right >= 54


def test_a_bad_line_fails_alone_with_the_engines_own_error(client: OpenAI, tmp_path: Path) -> None:
    good = chat_body(mixed(1, seed=3)[0])
    bodies: dict[str, dict[str, object]] = {
        "good": good,
        "type": {**good, "temperature": "hot"},
        "long": {**good, "messages": [{"role": "user", "content": "word " * 5000}]},
        "priority": {**good, "priority": -1000},
    }
    path = _file(
        tmp_path / "mixed.jsonl",
        [
            {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
            for name, body in bodies.items()
        ],
    )
    file = client.files.create(file=path, purpose="batch")
    created = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    batch = _ended(client, created.id)
    assert batch.status == "completed"
    assert batch.request_counts is not None and batch.output_file_id and batch.error_file_id
    assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 3)
    errors = {
        row["custom_id"]: row
        for row in map(json.loads, client.files.content(batch.error_file_id).text.splitlines())
    }
    assert set(errors) == {"type", "long", "priority"}
    for row in errors.values():
        assert row["error"] is None and row["response"]["status_code"] == 400
    assert "temperature" in json.dumps(errors["type"])
    assert "priority" in errors["priority"]["response"]["body"]["error"]["message"]


def test_the_command_line_runs_a_file_and_fetches_its_results(
    service: RunningService, tmp_path: Path
) -> None:
    submitted = service.qlm("submit", str(CHECKOUT / "examples/completions.jsonl"), "--wait")
    assert submitted.returncode == 0, submitted.stderr
    batch_id = submitted.stdout.split()[0]
    target = tmp_path / "out.jsonl"
    fetched = service.qlm("results", batch_id, "-o", str(target), "--json")
    assert json.loads(fetched.stdout)["lines"] == len(target.read_text().splitlines())
    listed = json.loads(service.qlm("list", "--json").stdout)
    assert batch_id in [batch["id"] for batch in listed["data"]]


def test_the_log_of_the_running_service_replays_to_the_same_plans(
    service: RunningService, tmp_path: Path
) -> None:
    submitted = service.qlm("submit", str(CHECKOUT / "examples/completions.jsonl"), "--wait")
    assert submitted.returncode == 0, submitted.stderr
    # A copy: the service goes on writing.
    log = tmp_path / "log.jsonl.gz"
    log.write_bytes((service.home / "log.jsonl.gz").read_bytes())
    told = replay(log)
    assert told.plans == told.same > 0
    assert told.skipped == 0
    assert told.fleet is not None
    (instance,) = told.fleet.instances
    assert told.history.arrivals[-1].model in instance.models


def test_the_command_line_says_what_is_wrong_and_how_to_mend_it(service: RunningService) -> None:
    nothing = service.qlm("submit", "-", stdin=b"")
    assert nothing.returncode == 1 and "--endpoint" in nothing.stderr
    unknown = service.qlm("status", "batch_unknown", "--json")
    assert unknown.returncode == 1
    assert "No batch found" in json.loads(unknown.stdout)["error"]["message"]
    elsewhere = service.qlm("list", "--url", "http://127.0.0.1:9")
    assert elsewhere.returncode == 4 and "qlm up" in elsewhere.stderr


def test_a_file_that_cannot_be_run_is_told_with_its_lines(
    service: RunningService, tmp_path: Path
) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"url": "/v1/completions"}\n{never\n')
    submitted = service.qlm("submit", str(file), "--wait")
    assert submitted.returncode == 3
    told = submitted.stdout.splitlines()
    assert "failed" in told[0]
    assert any("line 1" in line.lower() for line in told[1:])


def test_a_batch_can_be_cancelled_while_it_runs(client: OpenAI, tmp_path: Path) -> None:
    body = {
        "model": "qlm-tiny",
        "prompt": "tell",
        "max_tokens": 400,
        "ignore_eos": True,
        "temperature": 1,
    }
    path = _file(
        tmp_path / "long.jsonl",
        [
            {"custom_id": str(n), "method": "POST", "url": "/v1/completions", "body": body}
            for n in range(600)
        ],
    )
    file = client.files.create(file=path, purpose="batch")
    created = client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
    )
    deadline = time.monotonic() + 60
    while client.batches.retrieve(created.id).status == "validating":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert client.batches.cancel(created.id).status == "cancelling"
    batch = _ended(client, created.id, timeout_s=30)
    assert batch.status == "cancelled" and batch.request_counts is not None
    counts = batch.request_counts
    assert counts.completed + counts.failed == counts.total == 600
    assert counts.failed > 0
