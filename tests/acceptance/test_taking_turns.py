"""Two models and two adapters on one worker that holds one model at a time, as a user runs it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from openai import OpenAI

from qlm_batch.models import tiny_model_path
from qlm_batch.models.prompts import Prompt, chat_body, is_right, mixed
from tests.adapter_support import write_adapter

from .conftest import running_service

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

FIRST, SECOND, ADAPTER, WILD = "tiny-a", "tiny-b", "tiny-a-tuned", "tiny-a-wild"


@dataclass
class Turns:
    """The service, the folders of its models, and what its worker logged."""

    client: OpenAI
    http: httpx.Client
    models: Path
    home: Path

    @property
    def instance(self) -> dict[str, Any]:
        """The worker as `/v1/fleet` shows it."""
        (found,) = self.http.get("/v1/fleet").json()["instances"]
        return dict(found)

    @property
    def residency(self) -> dict[str, str]:
        """Where each model is."""
        return {model["name"]: model["residency"] for model in self.instance["models"]}

    def reasons(self, batch_id: str) -> list[str]:
        """Why things were decided for the batch."""
        made = self.http.get(f"/v1/batches/{batch_id}/decisions").json()["data"]
        return [str(decision["detail"].get("reason")) for decision in made]

    def logged(self, words: str) -> bool:
        """Whether the worker's log has the words."""
        return any(words in path.read_text() for path in self.home.rglob("worker.log"))

    def worker(self) -> psutil.Process:
        """The worker's process."""
        state = json.loads(next(self.home.rglob("service.json")).read_text())
        children = psutil.Process(state["pid"]).children()
        return next(child for child in children if child.cmdline()[-1] == "worker")

    def submit(self, lines: Sequence[tuple[str, Prompt]]) -> str:
        """A batch of (model, prompt) lines."""
        text = "".join(
            json.dumps(
                {
                    "custom_id": str(n),
                    "method": "POST",
                    "url": "/v1/chat/completions",
                    "body": chat_body(prompt, model=model),
                }
            )
            + "\n"
            for n, (model, prompt) in enumerate(lines)
        )
        file = self.client.files.create(file=("in.jsonl", text.encode()), purpose="batch")
        batch = self.client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        return batch.id

    def answers(self, batch_id: str) -> list[dict[str, Any]]:
        """All lines of the batch once it has completed."""
        until(lambda: self.client.batches.retrieve(batch_id).status == "completed", "the batch")
        output = self.client.batches.retrieve(batch_id).output_file_id
        assert output is not None
        return [json.loads(line) for line in self.client.files.content(output).text.splitlines()]


def until(reached: Callable[[], object], what: str, seconds: float = 150.0) -> None:
    """Wait until it is so."""
    give_up_at = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < give_up_at, f"not in {seconds:.0f} s: {what}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def turns(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Turns]:
    """`qlm up` with two copies of the shipped model, room for one, and two adapters of the first.

    One adapter changes nothing, the other drowns what the model learnt.
    """
    home = tmp_path_factory.mktemp("turns")
    models = home / "models"
    for name in (FIRST, SECOND):
        shutil.copytree(tiny_model_path(), models / name)
    options = ["--models-awake", "1"]
    for name, scale in ((ADAPTER, 0.0), (WILD, 1.0)):
        options += ["--lora", f"{name}={write_adapter(home / name, scale=scale)}"]
    for name in (FIRST, SECOND):
        options += ["--model", str(models / name)]
    limits = {"QLM_KV_CACHE_BYTES": str(64 * 1024**2), "QLM_MAX_MODEL_LEN": "1024"}
    with running_service(home, *options, settings=limits) as running:
        base = running.url.removesuffix("/v1")
        headers = {"Authorization": f"Bearer {running.key}"}
        with httpx.Client(base_url=base, headers=headers, timeout=30, trust_env=False) as http:
            client = OpenAI(base_url=running.url, api_key=running.key, max_retries=0, timeout=200)
            yield Turns(client, http, models, home)


def right(rows: Sequence[dict[str, Any]], lines: Sequence[tuple[str, Prompt]]) -> Counter[str]:
    """Right answers of each model."""
    found: Counter[str] = Counter()
    for row in rows:
        model, prompt = lines[int(row["custom_id"])]
        body = row["response"]["body"]
        assert body["model"] == model
        found[model] += is_right(prompt, body["choices"][0]["message"]["content"])
    return found


def test_models_are_listed_wherever_they_are_and_adapters_with_their_base(turns: Turns) -> None:
    listed = {model["id"]: model["parent"] for model in turns.http.get("/v1/models").json()["data"]}
    assert listed == {FIRST: None, SECOND: None, ADAPTER: FIRST, WILD: FIRST}
    assert turns.residency == dict.fromkeys((FIRST, ADAPTER, WILD), "awake") | {SECOND: "cold"}


def test_a_file_for_all_of_them_is_answered_although_loading_fails_at_first(turns: Turns) -> None:
    config = turns.models / SECOND / "config.json"
    hidden = config.rename(config.with_name("hidden.json"))
    prompts = mixed(16, seed=3)
    lines = [(model, prompt) for model in (FIRST, SECOND, ADAPTER, WILD) for prompt in prompts]
    batch_id = turns.submit(lines)
    until(lambda: turns.logged("engine did not wake"), "a failure")
    hidden.rename(config)
    rows = turns.answers(batch_id)
    assert Counter(row["custom_id"] for row in rows) == Counter(map(str, range(len(lines))))
    found = right(rows, lines)
    assert found[FIRST] == found[SECOND] == found[ADAPTER] >= 14
    assert found[WILD] < 4
    # What the worker last told, and what the scheduler made of it, may be from before.
    until(lambda: turns.residency[SECOND] == "awake", "residency")
    assert turns.residency[FIRST] == turns.residency[ADAPTER] == "cold"
    until(lambda: any("was made awake in" in reason for reason in turns.reasons(batch_id)), "why")
    swaps = f'qlm_swaps_total{{instance="gpu-0",model="{SECOND}"}} '
    until(lambda: swaps in turns.http.get("/metrics").text, "the count of swaps")
    assert f"{swaps}1.0" in turns.http.get("/metrics").text


def test_a_worker_killed_half_way_through_a_swap_loses_nothing(turns: Turns) -> None:
    prompts = mixed(16, seed=4)
    lines = [(model, prompt) for model in (SECOND, FIRST) for prompt in prompts]
    batch_id = turns.submit(lines)
    until(lambda: turns.instance["state"] == "swapping", "a swap")
    os.kill(turns.worker().pid, signal.SIGKILL)
    rows = turns.answers(batch_id)
    assert Counter(row["custom_id"] for row in rows) == Counter(map(str, range(len(lines))))
    found = right(rows, lines)
    assert found[FIRST] == found[SECOND] >= 14


def test_a_user_gets_an_answer_from_a_model_that_is_not_loaded(turns: Turns) -> None:
    until(lambda: turns.instance["state"] == "ready", "a worker")
    cold = next(name for name in (FIRST, SECOND) if turns.residency[name] == "cold")
    (prompt,) = mixed(1, seed=5)
    body = chat_body(prompt, model=cold)
    answer = turns.client.chat.completions.create(**body)
    assert answer.model == cold
    assert answer.choices[0].finish_reason == "stop"
    until(lambda: turns.residency[cold] == "awake", "residency")
