"""Faults of a request's body, told in words for people."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from qlm_batch.api.schemas import BatchCreate
from qlm_batch.api.validation import validation_error
from qlm_batch.domain.errors import InvalidInput


def refusal(**changes: object) -> InvalidInput:
    """What is said of a batch with these fields changed."""
    whole = {"input_file_id": "f", "endpoint": "/v1/embeddings", "completion_window": "24h"}
    with pytest.raises(ValidationError) as refused:
        BatchCreate.model_validate(whole | changes)
    found = [{**problem, "loc": ("body", *problem["loc"])} for problem in refused.value.errors()]
    return validation_error(found)


@pytest.mark.parametrize(
    ("changes", "param", "said"),
    [
        ({"metadata": {"k": "v" * 513}}, "metadata.k", "must have at most 512 characters"),
        (
            {"metadata": {"k" * 65: "v"}},
            "metadata",
            f"key '{'k' * 20}'… must have at most 64 characters",
        ),
        (
            {"metadata": {"k\0": "v"}},
            "metadata",
            "key 'k\\x00' must not contain NUL characters",
        ),
        ({"metadata": {"k": "\0"}}, "metadata.k", "must not contain NUL characters"),
        ({"metadata": {"k": 1}}, "metadata.k", "must be a text"),
        (
            {"metadata": {str(n): "v" for n in range(17)}},
            "metadata",
            "must have at most 16 pairs",
        ),
        ({"metadata": "text"}, "metadata", "must be an object"),
        ({"callbacks": 7}, "callbacks", "must be an object"),
        ({"completion_window": ""}, "completion_window", "must have at least 2 characters"),
        ({"on_miss": "shrug"}, "on_miss", "must be 'expire' or 'finish_late'"),
        ({"strict": "yes"}, "strict", "must be true or false"),
        (
            {"output_expires_after": {"anchor": "created_at", "seconds": 5}},
            "output_expires_after.seconds",
            "must be at least 3600",
        ),
    ],
)
def test_what_is_wrong_with_a_field_is_told_in_words_for_people(
    changes: dict[str, object], param: str, said: str
) -> None:
    error = refusal(**changes)
    assert (error.param, error.code) == (param, "invalid_value")
    assert error.message == f"Invalid value for '{param}': {said}."
