from __future__ import annotations

import pytest

from qlm_batch.domain.bodies import (
    MAX_GRAMMAR_CHARS,
    MAX_PROMPTS,
    OWNED_FIELDS,
    refuse_body,
    refuse_owned_fields,
)
from qlm_batch.domain.jobs import CHAT, EMBEDDINGS, EngineKind


def chat(**fields: object) -> dict[str, object]:
    return {"model": "m", "messages": [{"role": "user", "content": "hi"}]} | fields


def with_content(*parts: object) -> dict[str, object]:
    return chat(messages=[{"role": "user", "content": list(parts)}])


def test_an_ordinary_body_is_accepted() -> None:
    body = chat(n=2.0, logprobs=True, top_logprobs=5, stream=False, max_tokens=9, seed=1)
    assert refuse_owned_fields(body) is None


@pytest.mark.parametrize("field", OWNED_FIELDS)
def test_a_field_the_service_owns_is_refused_by_name(field: str) -> None:
    error = refuse_owned_fields(chat(**{field: "x"}))
    assert error is not None
    assert error.param == field
    assert field in error.message


def test_a_field_the_service_owns_may_be_null() -> None:
    assert refuse_owned_fields(chat(cache_salt=None, request_id=None)) is None


def test_a_chat_template_hidden_in_its_arguments_is_refused() -> None:
    error = refuse_owned_fields(chat(chat_template_kwargs={"chat_template": "{{ x }}"}))
    assert error is not None
    assert error.param == "chat_template_kwargs.chat_template"


def test_streaming_is_refused_naming_the_field() -> None:
    error = refuse_owned_fields(chat(stream=True))
    assert error is not None
    assert error.param == "stream"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 17),
        ("n", 0),
        ("n", -1),
        ("n", "17"),
        ("n", 17.0),
        ("best_of", 17),
        ("top_logprobs", 21),
        ("prompt_logprobs", -1),
    ],
)
def test_counts_are_bounded(field: str, value: int) -> None:
    error = refuse_owned_fields(chat(**{field: value}))
    assert error is not None
    assert error.param == field


def test_the_bound_on_n_can_be_set() -> None:
    assert refuse_owned_fields(chat(n=3), max_n=2) is not None
    assert refuse_owned_fields(chat(n=2), max_n=2) is None


@pytest.mark.parametrize("field", ["prompt", "input"])
def test_prompts_are_bounded_in_number_and_not_in_tokens(field: str) -> None:
    error = refuse_owned_fields({"model": "m", field: ["a"] * (MAX_PROMPTS + 1)})
    assert error is not None
    assert error.param == field
    assert refuse_owned_fields({"model": "m", field: ["a"] * MAX_PROMPTS}) is None
    assert refuse_owned_fields({"model": "m", field: [7] * (MAX_PROMPTS + 1)}) is None


def test_a_huge_grammar_is_refused() -> None:
    schema = {"type": "json_schema", "json_schema": {"schema": {"x": "y" * MAX_GRAMMAR_CHARS}}}
    error = refuse_owned_fields(chat(response_format=schema))
    assert error is not None
    assert error.param == "response_format"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://10.0.0.1/secret"}},
        {"type": "image_url", "image_url": "http://10.0.0.1/secret"},
        {"image_url": "file:///etc/passwd"},
        {"type": "audio_url", "audio_url": {"url": "https://other.example/a.wav"}},
        {"type": "tool", "nested": [{"video_url": {"url": "https://other.example/v"}}]},
        {"type": "image_url", "image_url": {"url": "https://good.example\\@other.example/"}},
        {"type": "image_url", "image_url": {"url": "https://good.example@other.example/"}},
        {"type": "image_url", "image_url": {"url": "http://[good.example/"}},
    ],
)
def test_media_elsewhere_are_refused_wherever_they_hide(part: dict[str, object]) -> None:
    error = refuse_owned_fields(
        with_content({"type": "text", "text": "?"}, part), media_domains=("good.example",)
    )
    assert error is not None
    assert error.param == "messages[0].content"


def test_inline_media_and_allowed_hosts_are_accepted() -> None:
    body = with_content(
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "image_url", "image_url": {"url": "https://good.example/cat.png"}},
    )
    assert refuse_owned_fields(body, media_domains=("good.example",)) is None


def test_text_that_mentions_an_address_is_accepted() -> None:
    assert refuse_owned_fields(with_content({"type": "text", "text": "see http://x.y/z"})) is None


def test_another_model_is_not_found() -> None:
    error = refuse_body(chat(model="other"), endpoint=CHAT, model="m", kind=EngineKind.GENERATE)
    assert error is not None
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")


def test_an_endpoint_of_the_other_kind_is_refused() -> None:
    body = {"model": "m", "input": "hi"}
    error = refuse_body(body, endpoint=EMBEDDINGS, model="m", kind=EngineKind.GENERATE)
    assert error is not None
    assert error.param == "url"
    assert refuse_body(body, endpoint=EMBEDDINGS, model="m", kind=EngineKind.EMBED) is None
