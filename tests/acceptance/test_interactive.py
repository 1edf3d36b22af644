"""Interactive requests on the real service and a real vLLM engine, while a batch runs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from qlm_batch.models.prompts import chat_body, mixed

from .conftest import RunningService

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

MODEL = "qlm-tiny"
QUESTION = "What is the capital of Peru?"


@pytest.fixture
def client(service: RunningService) -> Iterator[openai.OpenAI]:
    """The official client, with nothing but an address and a key."""
    with openai.OpenAI(base_url=service.url, api_key=service.key, max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, **more: object) -> str:
    """The answer to one question."""
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=32,
        **more,  # type: ignore[call-overload]
    )
    text: str = answer.choices[0].message.content
    return text


def ask_streamed(client: openai.OpenAI) -> tuple[str, float]:
    """The answer to the same question told as a stream, and the seconds to its first event."""
    began = time.monotonic()
    first_s: float | None = None
    text = ""
    for event in client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=32,
        stream=True,
        stream_options={"include_usage": True},
    ):
        first_s = first_s or time.monotonic() - began
        text += "".join(choice.delta.content or "" for choice in event.choices)
        usage = event.usage
    assert usage is not None and usage.completion_tokens > 0
    assert first_s is not None
    return text, first_s


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    whole = ask(client)
    assert whole
    assert ask_streamed(client)[0] == whole


def test_log_probabilities_and_a_json_schema_work_as_in_the_engine(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"yes": {"type": "boolean"}},
        "required": ["yes"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=64,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
    )
    assert set(json.loads(answer.choices[0].message.content or "")) == {"yes"}
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content
    assert len(logprobs.content[0].top_logprobs) == 2


def test_completions_are_answered(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=QUESTION, max_tokens=8)
    assert answer.usage is not None and answer.usage.completion_tokens > 0


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses_comes_back_as_its_error(
    client: openai.OpenAI, stream: bool
) -> None:
    for body in (
        {"prompt": "x " * 20_000},
        {"prompt": "Once", "temperature": -3},
        {"prompt": "Once", "extra_body": {"structured_outputs": {"json": "{no schema"}}},
        {"prompt": "Once", "extra_body": {"priority": -5}},
    ):
        with pytest.raises(openai.BadRequestError) as refusal:
            client.completions.create(model=MODEL, stream=stream, **body)  # type: ignore[call-overload]
        assert refusal.value.body is not None


def test_a_user_chats_while_a_batch_runs(
    client: openai.OpenAI, service: RunningService, tmp_path: Path
) -> None:
    alone = ask(client)
    path = tmp_path / "questions.jsonl"
    path.write_text(
        "".join(
            json.dumps(
                {
                    "custom_id": f"q{n}",
                    "method": "POST",
                    "url": "/v1/chat/completions",
                    "body": chat_body(prompt, model=MODEL),
                }
            )
            + "\n"
            for n, prompt in enumerate(mixed(4000, seed=5))
        )
    )
    file = client.files.create(file=path, purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    until = time.monotonic() + 60
    while not (counts := client.batches.retrieve(batch.id).request_counts) or not counts.completed:
        assert time.monotonic() < until
        time.sleep(0.05)
    told = [ask_streamed(client) for _ in range(5)]
    assert client.batches.retrieve(batch.id).status == "in_progress"
    assert {text for text, _ in told} == {alone}
    assert sorted(first_s for _, first_s in told)[2] < 2.0
    after = client.batches.retrieve(batch.id).request_counts
    client.batches.cancel(batch.id)
    assert after is not None and after.completed > counts.completed and not after.failed
    metrics = httpx.get(service.url.removesuffix("/v1") + "/metrics").text
    assert 'qlm_slo_total{met="yes",slo_class="interactive"}' in metrics
