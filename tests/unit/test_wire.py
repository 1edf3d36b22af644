"""The JSON shape of hints."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlm_batch.dispatch.wire import decode, encode
from qlm_batch.domain.errors import InvalidInput
from qlm_batch.domain.messages import Assigned, Stopped

text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=64)
messages = st.builds(Assigned, text, text) | st.builds(Stopped, text)


@given(messages)
def test_a_message_survives_the_journey_through_json(message: Assigned | Stopped) -> None:
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
            "v": st.just(1) | json_values,
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
        ({"v": 2}, "version"),
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
