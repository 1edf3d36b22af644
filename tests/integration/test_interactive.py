"""Interactive requests through a real database, broker and worker, on the simulated engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from qlm_batch.domain.interactive import InteractiveState
from qlm_batch.embedded.postgres import EmbeddedPostgres
from qlm_batch.embedded.valkey import EmbeddedValkey
from tests.api_support import error_of, wait_until
from tests.contract.harness import MODEL
from tests.integration.interactive_support import (
    Line,
    chat,
    events,
    fresh_database,
    own_redis,
    text_of,
    whole_line,
)

EMBEDDER = "tiny-embedder"
TOO_LONG = {"role": "user", "content": "x" * 40_000}


@pytest.fixture(scope="module")
def line(
    postgres: EmbeddedPostgres, valkey: EmbeddedValkey, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Line]:
    """One line for all tests here, with an engine that answers at once."""
    folder: Path = tmp_path_factory.mktemp("line")
    redis_url = own_redis(valkey.url, 2)
    models = json.dumps([MODEL, f"embed:{EMBEDDER}"])
    with (
        fresh_database(postgres) as url,
        whole_line(url, redis_url, folder, models=models) as line,
    ):
        yield line


def test_a_chat_is_answered_whole(line: Line) -> None:
    answer = line.post("/v1/chat/completions", chat())
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["content"]
    assert body["usage"]["completion_tokens"] == 8


def test_a_streamed_chat_says_what_the_whole_one_says(line: Line) -> None:
    whole = line.post("/v1/chat/completions", chat()).json()
    answer = line.post("/v1/chat/completions", chat(stream=True))
    assert answer.headers["content-type"].startswith("text/event-stream")
    told = events(answer)
    assert text_of(told) == whole["choices"][0]["message"]["content"]
    assert told[-1]["choices"][0]["finish_reason"]
    assert all(event["choices"] for event in told)


def test_usage_ends_a_stream_for_those_who_ask(line: Line) -> None:
    options = {"stream_options": {"include_usage": True}}
    *_, last = events(line.post("/v1/chat/completions", chat(stream=True, **options)))
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 8


def test_what_was_answered_is_stored_with_its_usage_and_timings(line: Line) -> None:
    line.forget()
    line.post("/v1/chat/completions", chat(stream=True), **{"x-qlm-ttft": "0.25"})
    wait_until(lambda: line.requests()[0].state is InteractiveState.DONE)
    (stored,) = line.requests()
    assert (stored.status_code, stored.usage.output_tokens) == (200, 8)
    assert (stored.ttft_s, stored.streamed, stored.epoch) == (0.25, True, 1)
    assert stored.first_token_s is not None
    assert stored.result is not None and stored.result.count("\n") >= 8
    wait_until(lambda: not line.keys())


@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_goes_by_the_id_of_its_response(line: Line, *, streamed: bool) -> None:
    answer = line.post("/v1/chat/completions", chat(stream=streamed))
    named = answer.headers["x-request-id"]
    told = events(answer)[0] if streamed else answer.json()
    assert told["id"] == f"chatcmpl-{named}"


def test_a_name_of_the_clients_own_is_not_an_answers_id(line: Line) -> None:
    first, second = (
        line.post("/v1/chat/completions", chat(), **{"x-request-id": "mine"}) for _ in range(2)
    )
    assert first.headers["x-request-id"] == second.headers["x-request-id"] == "mine"
    assert first.json()["id"] != second.json()["id"]


def test_a_body_may_hold_more_than_other_calls_take_but_not_anything(line: Line) -> None:
    text = {"type": "text", "text": "x" * 2_000_000}
    long = chat(messages=[{"role": "user", "content": [text]}])
    said = error_of(line.post("/v1/chat/completions", long), 400)["message"]
    assert "context" in said
    endless = chat(messages=[{"role": "user", "content": "x" * 17_000_000}])
    assert "16777216" in error_of(line.post("/v1/chat/completions", endless), 413)["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_body_nested_too_deeply_is_a_bad_request(line: Line, stream: bool) -> None:
    nested: object = 1
    for _ in range(300):
        nested = [nested]
    answer = line.post("/v1/chat/completions", chat(stream=stream, chat_template_kwargs=nested))
    error = error_of(answer, 400)
    assert error["code"] == "invalid_json"
    assert "nested" in error["message"]


def test_completions_and_two_choices(line: Line) -> None:
    body = {"model": MODEL, "prompt": "Once", "max_tokens": 4, "n": 2}
    answer = line.post("/v1/completions", body).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "nobody/serves-this"}, 404, "model"),
        ({"model": None}, 400, "model"),
        ({"stream": "yes"}, 400, "stream"),
        ({"stream": True, "stream_options": 7}, 400, "stream_options"),
        ({"priority": -1000}, 400, "priority"),
        ({"priority": -1000, "stream": True}, 400, "priority"),
        ({"cache_salt": "theirs"}, 400, "cache_salt"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [TOO_LONG], "stream": True}, 400, "messages"),
    ],
)
def test_a_bad_request_gets_openai_s_error_naming_the_field(
    line: Line, body: dict[str, object], status: int, param: str
) -> None:
    answer = line.post("/v1/chat/completions", chat() | body)
    assert error_of(answer, status)["param"] == param
    assert answer.headers["x-should-retry"] == "false"


@pytest.fixture
def client(line: Line) -> Iterator[openai.OpenAI]:
    """The official client, as it comes."""
    with openai.OpenAI(base_url=f"{line.url}/v1", api_key=line.key, max_retries=0) as client:
        yield client


def test_the_official_client_chats_completes_and_embeds(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Is it so?"}]
    whole = client.chat.completions.create(
        model=MODEL,
        messages=messages,  # type: ignore[arg-type]
        max_tokens=8,
        seed=7,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {}}},
        tools=[{"type": "function", "function": {"name": "look", "parameters": {}}}],
        extra_headers={"x-qlm-ttft": "1.5"},
    )
    assert whole.choices[0].message.content
    assert whole.usage is not None and whole.usage.completion_tokens == 8
    streamed = client.chat.completions.create(
        model=MODEL,
        messages=messages,  # type: ignore[arg-type]
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(streamed)
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 8
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1])
    completion = client.completions.create(model=MODEL, prompt="Once", max_tokens=4)
    assert completion.choices[0].text
    embedded = client.embeddings.create(model=EMBEDDER, input=["one", "two"])
    assert [item.index for item in embedded.data] == [0, 1]
    assert len(embedded.data[0].embedding) == len(embedded.data[1].embedding) > 0


def test_the_official_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="is not served"):
        client.completions.create(model="nobody", prompt="Once")
    with pytest.raises(openai.BadRequestError, match="context length"):
        client.completions.create(model=MODEL, prompt="x" * 40_000)
    with pytest.raises(openai.BadRequestError, match="context length"):
        client.completions.create(model=MODEL, prompt="x" * 40_000, stream=True)


def test_an_embedding_asked_of_a_model_that_generates_is_refused(line: Line) -> None:
    answer = line.post("/v1/embeddings", {"model": MODEL, "input": "hello"})
    error = error_of(answer, 400)
    assert (error["code"], error["param"]) == ("unsupported_endpoint", "model")


def test_a_stream_without_a_key_is_refused(line: Line) -> None:
    with line.client(headers={"authorization": ""}) as client:
        error_of(client.post("/v1/chat/completions", json=chat(stream=True)), 401)


def test_the_metrics_tell_first_tokens_and_attainment(line: Line) -> None:
    line.post("/v1/chat/completions", chat(stream=True))
    with line.client() as client:
        text = client.get("/metrics").text
    assert "qlm_interactive_first_token_seconds_count" in text
    assert 'qlm_slo_total{met="yes",slo_class="interactive"}' in text
    assert 'qlm_interactive_requests_total{status="200"}' in text
