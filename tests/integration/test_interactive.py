"""Interactive requests through a real database, broker and worker, on the simulated engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qlm_batch.embedded.postgres import EmbeddedPostgres
from qlm_batch.embedded.valkey import EmbeddedValkey
from tests.api_support import error_of, wait_until
from tests.conftest import _database
from tests.contract.harness import MODEL
from tests.integration.interactive_support import Line, chat, events, text_of, whole_line


@pytest.fixture(scope="module")
def line(
    postgres: EmbeddedPostgres, valkey: EmbeddedValkey, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Line]:
    """One line for all tests here, with an engine that answers at once."""
    folder: Path = tmp_path_factory.mktemp("line")
    for url in _database(postgres, "template_qlm"):
        with whole_line(url, valkey.url, folder) as line:
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
