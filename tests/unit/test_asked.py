"""Bodies of interactive requests."""

from __future__ import annotations

import json

import pytest

from qlm_batch.api.asked import Asked, read_asked
from qlm_batch.domain.errors import InvalidInput
from qlm_batch.domain.jobs import CHAT


def read(**changes: object) -> Asked:
    """What a chat with these fields changed asks for."""
    return read_asked(json.dumps({"model": "m", "messages": []} | changes).encode(), CHAT)


def refusal(**changes: object) -> InvalidInput:
    """Why such a chat is refused."""
    with pytest.raises(InvalidInput) as refused:
        read(**changes)
    return refused.value


@pytest.mark.parametrize(
    ("model", "code", "said"),
    [
        (None, "missing_required_parameter", "Missing required parameter"),
        (7, "invalid_type", "must be a text"),
        (["m"], "invalid_type", "must be a text"),
        ("", "invalid_value", "must not be empty"),
        ("m" * 513, "invalid_value", "at most 512 characters"),
        ("m\0", "invalid_value", "no NUL"),
    ],
)
def test_a_model_that_cannot_be_one_is_told_for_what_it_is(
    model: object, code: str, said: str
) -> None:
    error = refusal(model=model)
    assert (error.param, error.code) == ("model", code)
    assert said in error.message


def test_a_models_name_may_be_as_long_as_in_a_file() -> None:
    assert read(model="m" * 512).model == "m" * 512


@pytest.mark.parametrize("stream", [1, 0, 1.0, "true", []])
def test_a_stream_is_asked_for_with_true_and_nothing_like_it(stream: object) -> None:
    error = refusal(stream=stream)
    assert (error.param, error.code) == ("stream", "invalid_value")


def test_a_byte_order_mark_before_the_body_is_dropped() -> None:
    assert read_asked(b'\xef\xbb\xbf{"model": "m"}', CHAT).model == "m"
