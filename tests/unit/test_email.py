"""What the e-mail says, and that nothing a tenant chose can break it."""

from __future__ import annotations

from email.message import EmailMessage

import pytest

from qlm_batch.callbacks.email import EmailConfig, compose
from qlm_batch.domain.jobs import BatchState, LineError, RequestCounts, Usage
from tests.integration.callback_support import batch, item

CONFIG = EmailConfig("smtp://localhost", "qlm <batches@example.com>", "https://qlm.example/")
ITEM = item(channel="email", target="ann@example.com")


def text_of(message: EmailMessage) -> str:
    part = message.get_body(("plain",))
    assert part is not None
    return str(part.get_content())


def html_of(message: EmailMessage) -> str:
    part = message.get_body(("html",))
    assert part is not None
    return str(part.get_content())


def test_it_gives_counts_tokens_times_and_links_in_both_forms() -> None:
    done = batch(
        counts=RequestCounts(12_000, 11_990, 10),
        usage=Usage(input_tokens=1_000_000, output_tokens=20),
        output_file_id="file-out",
        error_file_id="file-err",
    )
    message = compose(ITEM, done, CONFIG)
    assert message["Subject"] == "Batch batch_1 is complete"
    assert message["To"] == "ann@example.com"
    for body in (text_of(message), html_of(message)):
        for said in (
            "12,000",
            "11,990",
            "1,000,000 in, 20 out",
            "2027-01-15 08:00:00 UTC",
            "2 h 46 min",
            "https://qlm.example/v1/batches/batch_1",
            "https://qlm.example/v1/files/file-out/content",
            "https://qlm.example/v1/files/file-err/content",
        ):
            assert said in body


def test_every_attempt_has_the_same_message_id() -> None:
    first, second = (compose(ITEM, batch(), CONFIG) for _ in range(2))
    assert first["Message-ID"] == second["Message-ID"] == "<evt_0123@example.com>"


def test_a_refused_file_is_explained_and_its_words_are_escaped() -> None:
    errors = tuple(
        LineError("invalid_json_line", f"Line {n}: <script>", n, None) for n in range(1, 101)
    )
    failed = batch(
        state=BatchState.FAILED,
        completed_at=None,
        failed_at=1_799_990_001.0,
        errors=errors,
        error_count=5_000,
    )
    message = compose(item(channel="email", target="a@b.c", type="batch.failed"), failed, CONFIG)
    assert message["Subject"] == "Batch batch_1 was refused"
    assert "the first 10 of 5,000" in text_of(message)
    assert "Line 10: <script>" in text_of(message)
    assert "Line 11" not in text_of(message)
    assert "Succeeded" not in text_of(message)
    assert "<script>" not in html_of(message)
    assert "Line 1: &lt;script&gt;" in html_of(message)


@pytest.mark.parametrize("kind", ["completed", "failed", "expired", "cancelled"])
def test_every_event_has_its_own_words(kind: str) -> None:
    subject = compose(item(type=f"batch.{kind}", target="a@b.c"), batch(), CONFIG)["Subject"]
    assert len(subject) > len("Batch batch_1 ")


def test_an_address_cannot_bring_headers_of_its_own() -> None:
    with pytest.raises(ValueError, match="Header"):
        compose(item(target="a@b.c\r\nBcc: everyone@example.com"), batch(), CONFIG)
