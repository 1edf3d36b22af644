"""The JSON shape of messages."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlm_batch.dispatch.wire import VERSION, decode, encode
from qlm_batch.domain.errors import InvalidInput
from qlm_batch.domain.messages import Assigned, Interactive, Stopped
from qlm_batch.settings import Settings

text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=64)
numbers = st.integers(0, 2**31)
times = st.floats(0, 2e9)
calls = st.builds(
    Interactive, text, numbers, text, text, text, text, text, text, st.booleans(), times, text
)
messages = st.builds(Assigned, text, text) | st.builds(Stopped, text) | calls
CALL = Interactive("req", 1, "gpu-0", "boot", "t", "/v1/completions", "m", "{}", True, 1.5, "api_1")


@given(messages)
def test_a_message_survives_the_journey_through_json(
    message: Assigned | Stopped | Interactive,
) -> None:
    assert decode(json.loads(json.dumps(encode(message)))) == message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "v": st.just(VERSION) | json_values,
            "type": st.sampled_from(["assigned", "stopped"]) | json_values,
            "instance": json_values,
            "boot_id": json_values,
            "batch_id": json_values,
        },
    )
    | json_values
)
def test_anything_else_is_refused_in_words_and_never_crashes(data: object) -> None:
    try:
        message = decode(data)
    except InvalidInput as refusal:
        assert refusal.message
    else:
        assert encode(message) == data


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"v": VERSION + 1}, "version"),
        ({"type": "paused"}, "type"),
        ({"instance": ""}, "instance"),
        ({"boot_id": 7}, "boot_id"),
        ({"boot_id": "x" * 300}, "boot_id"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_refusal_names_the_field(change: dict[str, object], word: str) -> None:
    with pytest.raises(InvalidInput, match=word):
        decode(encode(Assigned("gpu-0", "boot")) | change)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"epoch": "1"}, "epoch"),
        ({"epoch": True}, "epoch"),
        ({"streamed": 1}, "streamed"),
        ({"due_at": None}, "due_at"),
        ({"body": ""}, "body"),
    ],
)
def test_a_call_with_a_wrong_field_is_refused(change: dict[str, object], word: str) -> None:
    with pytest.raises(InvalidInput, match=word):
        decode(encode(CALL) | change)


def test_a_call_carries_the_longest_body_that_the_api_lets_in() -> None:
    long = replace(CALL, body="x" * Settings().interactive_body_bytes)
    assert decode(encode(long)) == long
