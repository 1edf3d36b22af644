"""What vLLM's layer answers, as the service's clients read it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from qlm_workers.vllm_answers import shape


class _Refusal:
    """An error model as vLLM's layer returns it."""

    def __init__(self, message: str) -> None:
        self.error = SimpleNamespace(message=message, code=400)

    def model_dump_json(self) -> str:
        return json.dumps({"error": vars(self.error)})


@pytest.mark.parametrize(
    "message",
    [
        '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set',
        'tool_choice="required" requires --tool-call-parser to be set',
    ],
)
def test_tools_without_a_parser_are_refused_with_the_settings_that_mend_it(message: str) -> None:
    answer = shape(_Refusal(message), None, 0.1)
    assert answer.status_code == 400
    said = json.loads(answer.body)["error"]["message"]
    assert said.startswith(message)
    assert "--tool-parser NAME" in said
    assert "QLM_TOOL_PARSER" in said


def test_other_refusals_are_told_in_vllms_words() -> None:
    answer = shape(_Refusal("n must be at least 1, got 0."), None, 0.1)
    assert json.loads(answer.body)["error"]["message"] == "n must be at least 1, got 0."
