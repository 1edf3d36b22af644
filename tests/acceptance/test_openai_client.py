"""The official client works unchanged, with only `base_url` and `api_key` set."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from cryptography.fernet import Fernet

from qlm_batch.domain.jobs import ClaimedRequest
from qlm_batch.store.postgres import PostgresStore
from tests.api_support import CHAT, MODEL, Site, input_file, make_site, says_yes


@pytest.fixture
def postgres_store(postgres_url: str) -> Iterator[PostgresStore]:
    store = PostgresStore(postgres_url, secret_key=Fernet.generate_key())
    yield store
    store.close()


@pytest.fixture
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Site:
    if getattr(request, "param", "memory") == "memory":
        return make_site(tmp_path)
    return make_site(tmp_path, store=request.getfixturevalue("postgres_store"))


on_every_store = pytest.mark.parametrize("site", ["memory", "postgres"], indirect=True)


@pytest.fixture
def client(site: Site) -> Iterator[openai.OpenAI]:
    with (
        site.served() as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key=site.key(), max_retries=0) as client,
    ):
        yield client


def submit(client: openai.OpenAI, *ids: str, **extra: object) -> openai.types.Batch:
    file = client.files.create(file=("in.jsonl", input_file(*ids)), purpose="batch")
    return client.batches.create(
        input_file_id=file.id,
        endpoint=CHAT,
        completion_window="24h",
        **extra,  # type: ignore[arg-type]
    )


@on_every_store
def test_the_whole_round_trip(site: Site, client: openai.OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_bytes(input_file("a", "b", "c"))
    with path.open("rb") as source:
        file = client.files.create(file=source, purpose="batch")
    assert client.files.wait_for_processing(file.id).status == "processed"
    assert (file.filename, file.purpose) == ("questions.jsonl", "batch")
    assert file.bytes == path.stat().st_size

    batch = client.batches.create(
        input_file_id=file.id,
        endpoint=CHAT,
        completion_window="24h",
        metadata={"team": "one"},
    )
    assert batch.status == "validating"
    assert batch.metadata == {"team": "one"}
    site.read_in()
    assert client.batches.retrieve(batch.id).status == "in_progress"

    def one_fails(request: ClaimedRequest) -> tuple[int, dict[str, object]]:
        if request.position == 1:
            return 400, {"error": {"message": "no", "type": "t", "param": None, "code": None}}
        return says_yes(request)

    site.run(one_fails)
    assert client.batches.retrieve(batch.id).status == "finalizing"
    site.write_out()

    done = client.batches.retrieve(batch.id)
    assert done.status == "completed"
    assert done.model == MODEL
    assert done.request_counts is not None
    assert done.request_counts.to_dict() == {"total": 3, "completed": 2, "failed": 1}
    assert done.usage is not None
    assert done.usage.input_tokens_details.cached_tokens == 12
    assert done.usage.output_tokens_details.reasoning_tokens == 6
    assert done.usage.total_tokens == 45
    assert done.output_file_id
    assert done.error_file_id

    good = [json.loads(line) for line in client.files.content(done.output_file_id).iter_lines()]
    assert {line["custom_id"] for line in good} == {"a", "c"}
    assert {line["response"]["status_code"] for line in good} == {200}
    (bad,) = client.files.content(done.error_file_id).text.splitlines()
    assert json.loads(bad)["custom_id"] == "b"
    assert json.loads(bad)["error"] is None

    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_content_comes_back_byte_for_byte(client: openai.OpenAI) -> None:
    content = b"\xff\x00\r\n--not-the-boundary\r\n" * 50_000
    file = client.files.create(file=("raw.bin", content), purpose="batch")
    assert client.files.content(file.id).content == content


@on_every_store
def test_lists_are_paged_through_by_the_client(client: openai.OpenAI) -> None:
    made = [submit(client, "a").id for _ in range(5)]
    assert [batch.id for batch in client.batches.list(limit=2)] == made[::-1]
    page = client.batches.list(limit=2)
    assert page.has_more
    assert [batch.id for batch in page.data] == made[:2:-1]


def test_files_are_listed_in_either_order(client: openai.OpenAI) -> None:
    made = [client.files.create(file=b"{}", purpose="batch").id for _ in range(3)]
    assert [file.id for file in client.files.list(order="asc", limit=2)] == made
    assert [file.id for file in client.files.list(purpose="batch")] == made[::-1]
    assert not list(client.files.list(purpose="batch_output"))


@on_every_store
def test_a_running_batch_is_cancelled_and_keeps_what_it_has(
    site: Site, client: openai.OpenAI
) -> None:
    batch = submit(client, "a", "b", "c", "d")
    site.read_in()
    site.run(most=2)
    assert client.batches.cancel(batch.id).status == "cancelling"
    assert client.batches.cancel(batch.id).status == "cancelling"
    site.write_out()
    ended = client.batches.retrieve(batch.id)
    assert ended.status == "cancelled"
    assert ended.request_counts is not None
    assert ended.request_counts.completed == 2
    assert ended.request_counts.failed == 2


def test_cancelling_a_completed_batch_is_a_conflict_that_is_not_retried(
    site: Site, client: openai.OpenAI
) -> None:
    batch = submit(client, "a")
    site.read_in()
    site.run()
    site.write_out()
    with pytest.raises(openai.ConflictError) as refused:
        client.with_options(max_retries=5).batches.cancel(batch.id)
    assert refused.value.body == {
        "message": "Cannot cancel a batch with status 'completed'.",
        "type": "invalid_request_error",
        "param": refused.value.param,
        "code": refused.value.code,
    }
    assert refused.value.response.headers["x-should-retry"] == "false"


def test_an_unknown_batch_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="No batch found with id 'batch_none'"):
        client.batches.retrieve("batch_none")


def test_a_wrong_key_is_an_authentication_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError) as refused:
        client.with_options(api_key="sk-qlm-wrong").models.list()
    assert refused.value.code == "invalid_api_key"
    assert refused.value.request_id


def test_a_bad_argument_names_the_field(client: openai.OpenAI) -> None:
    file = client.files.create(file=b"{}", purpose="batch")
    with pytest.raises(openai.BadRequestError) as refused:
        client.batches.create(
            input_file_id=file.id,
            endpoint=CHAT,
            completion_window="soon",  # type: ignore[arg-type]
        )
    assert refused.value.param == "completion_window"


def test_a_file_may_expire(client: openai.OpenAI) -> None:
    file = client.files.create(
        file=b"{}", purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert file.expires_at == file.created_at + 3600


@on_every_store
def test_a_repeated_create_with_an_idempotency_key_returns_the_same_batch(
    client: openai.OpenAI,
) -> None:
    file = client.files.create(file=b"{}", purpose="batch")
    key = {"Idempotency-Key": "once"}
    first, second = (
        client.batches.create(
            input_file_id=file.id, endpoint=CHAT, completion_window="24h", extra_headers=key
        )
        for _ in range(2)
    )
    assert first.id == second.id
    with pytest.raises(openai.UnprocessableEntityError):
        client.batches.create(
            input_file_id=file.id,
            endpoint=CHAT,
            completion_window="24h",
            metadata={"other": "body"},
            extra_headers=key,
        )


def test_models_are_those_of_live_instances(site: Site, client: openai.OpenAI) -> None:
    assert not list(client.models.list())
    site.heartbeat()
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("test/none")


async def test_the_asynchronous_client_works_too(site: Site) -> None:
    with site.served() as url:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=site.key()) as client:
            file = await client.files.create(file=input_file("a"), purpose="batch")
            batch = await client.batches.create(
                input_file_id=file.id, endpoint=CHAT, completion_window="24h"
            )
            assert [found.id async for found in client.batches.list()] == [batch.id]
            content = await client.files.content(file.id)
            assert content.read() == input_file("a")
