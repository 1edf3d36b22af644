"""What engines tell of their tokens, whatever the server."""

from __future__ import annotations

import math

import pytest

from qlm_batch.domain.jobs import Usage
from qlm_workers.answers import MOST_TOKENS, cut_in, usage_of


def test_counts_are_read_with_their_details() -> None:
    told = {
        "prompt_tokens": 7,
        "completion_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    assert usage_of(told) == Usage(7, 3, 5, 2)


@pytest.mark.parametrize(
    ("told", "tokens"),
    [
        (12.0, 12),
        (None, 0),
        ("12", 0),
        ([12], 0),
        (True, 0),
        (-1, 0),
        (10**400, MOST_TOKENS),
        (1e300, MOST_TOKENS),
        (math.inf, MOST_TOKENS),
        (math.nan, 0),
    ],
)
def test_a_count_is_always_one_that_can_be_stored(told: object, tokens: int) -> None:
    read = usage_of({"completion_tokens": told}).output_tokens
    assert (read, type(read)) == (tokens, int)


@pytest.mark.parametrize("odd", [None, 7, "none", [1]])
def test_what_is_no_object_tells_nothing(odd: object) -> None:
    assert usage_of(odd) == Usage()
    assert usage_of({"prompt_tokens_details": odd, "completion_tokens_details": odd}) == Usage()


@pytest.mark.parametrize(
    ("choices", "cut"),
    [
        ([{"finish_reason": "stop"}, {"finish_reason": "length"}], True),
        ([{"finish_reason": "stop"}, {"finish_reason": None}, {}], False),
        ([None, "length"], False),
        ("length", False),
        (None, False),
    ],
)
def test_one_choice_at_its_bound_makes_an_answer_cut(choices: object, cut: bool) -> None:
    assert cut_in({"choices": choices}) is cut
