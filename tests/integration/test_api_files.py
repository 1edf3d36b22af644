"""Uploads as they arrive from all kinds of clients."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from qlm_batch.api.multipart import MultipartUpload
from qlm_batch.domain.errors import Unavailable
from qlm_batch.domain.jobs import FileRecord
from qlm_batch.intake.scratch import make_scratch
from tests.api_support import Site, error_of, input_file, make_site, submit, upload, wait_until

MAX_BYTES = 3_000_000


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return make_site(tmp_path, max_file_bytes=MAX_BYTES)


@pytest.fixture
def client(site: Site) -> Iterator[TestClient]:
    with site.client() as client:
        yield client


def leftovers(site: Site) -> list[Path]:
    """Everything an upload put on the disk and that is still there."""
    return [path for path in site.settings.data_dir.rglob("*") if path.is_file()]


def post(client: TestClient, body: bytes, kind: str = "multipart/form-data; boundary=b") -> object:
    return client.post("/v1/files", content=body, headers={"content-type": kind})


def part(name: str, content: bytes, filename: str | None = None) -> bytes:
    named = f'; filename="{filename}"' if filename is not None else ""
    return (
        f'--b\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode()
        + content
        + b"\r\n"
    )


PURPOSE = part("purpose", b"batch")
END = b"--b--\r\n"


def test_a_file_object_has_every_field_with_explicit_nulls(client: TestClient) -> None:
    made = upload(client, b"{}\n")
    assert made == {
        "id": made["id"],
        "object": "file",
        "bytes": 3,
        "created_at": 1_800_000_000,
        "expires_at": None,
        "filename": "input.jsonl",
        "purpose": "batch",
        "status": "processed",
        "status_details": None,
    }
    assert made["id"].startswith("file-")
    assert client.get(f"/v1/files/{made['id']}").json() == made


@pytest.mark.parametrize("purpose", ["assistants", "fine-tune", "user_data", "vision", "evals"])
def test_there_are_no_files_of_openais_other_purposes(client: TestClient, purpose: str) -> None:
    file_id = upload(client, b"{}")["id"]
    found = client.get("/v1/files", params={"purpose": purpose})
    assert found.json() == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }
    own = client.get("/v1/files", params={"purpose": "batch"}).json()["data"]
    assert [file["id"] for file in own] == [file_id]


def test_content_is_hashed_and_comes_back_whatever_the_client_accepts(
    site: Site, client: TestClient
) -> None:
    content = os.urandom(2_500_000)
    made = upload(client, content)
    answer = client.get(f"/v1/files/{made['id']}/content", headers={"accept": "application/binary"})
    assert answer.content == content
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-length"] == str(len(content))
    assert site.store.file("acme", made["id"]).sha256 == hashlib.sha256(content).hexdigest()


def test_the_file_may_come_before_its_fields(client: TestClient) -> None:
    answer = post(client, part("file", b"x", "a.jsonl") + PURPOSE + END)
    assert answer.json()["bytes"] == 1  # type: ignore[attr-defined]


def test_an_empty_file_is_taken_and_left_to_validation(client: TestClient) -> None:
    assert upload(client, b"")["bytes"] == 0


def test_the_largest_file_allowed_is_taken(client: TestClient) -> None:
    assert upload(client, b"x" * MAX_BYTES)["bytes"] == MAX_BYTES


@pytest.mark.parametrize("declared", [True, False])
def test_a_file_too_large_is_refused_in_the_contracts_words(
    site: Site, client: TestClient, declared: bool
) -> None:
    body = PURPOSE + part("file", b"x" * (MAX_BYTES + 1), "a") + END
    if declared:
        body = PURPOSE + part("file", b"x" * (MAX_BYTES + 100_000), "a") + END
    answer = client.post(
        "/v1/files",
        content=body
        if declared
        else iter([body[i : i + 65536] for i in range(0, len(body), 65536)]),
        headers={"content-type": "multipart/form-data; boundary=b"},
    )
    assert error_of(answer, 400)["message"] == "File is too large."
    assert not leftovers(site)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"garbage", None),
        (END, "file"),
        (PURPOSE + END, "file"),
        (part("file", b"x", "a") + END, "purpose"),
        (PURPOSE + part("file", b"x", "a"), None),
        (PURPOSE + part("file", b"x", "a")[:-3], None),
        (PURPOSE + part("file", b"x", "a") + part("file", b"y", "b") + END, "file"),
        (PURPOSE + PURPOSE + part("file", b"x", "a") + END, "purpose"),
        (part("purpose", b"fine-tune") + part("file", b"x", "a") + END, "purpose"),
        (part("purpose", b"b" * 5_000) + part("file", b"x", "a") + END, "purpose"),
        (PURPOSE + part("colour", b"red") + part("file", b"x", "a") + END, "colour"),
        (b"--b\r\nX: y\r\n\r\nz\r\n" + END, None),
        (b"--b\r\nContent-Disposition: " + b"x" * 20_000 + b"\r\n\r\nz\r\n" + END, None),
    ],
)
def test_a_malformed_form_is_refused_and_leaves_nothing(
    site: Site, client: TestClient, body: bytes, param: str | None
) -> None:
    error = error_of(post(client, body), 400)
    assert error["param"] == param
    assert error["code"]
    assert not leftovers(site)
    assert not client.get("/v1/files").json()["data"]


@pytest.mark.parametrize(
    "kind",
    ["application/json", "multipart/form-data", "multipart/form-data; boundary=" + "x" * 900],
)
def test_what_is_not_multipart_is_refused(client: TestClient, kind: str) -> None:
    assert error_of(post(client, b"{}", kind), 400)["code"] == "invalid_body"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"expires_after[seconds]": "3600"}, "expires_after[anchor]"),
        (
            {"expires_after[anchor]": "now", "expires_after[seconds]": "3600"},
            "expires_after[anchor]",
        ),
        ({"expires_after[anchor]": "created_at"}, "expires_after[seconds]"),
        *(
            (
                {"expires_after[anchor]": "created_at", "expires_after[seconds]": seconds},
                "expires_after[seconds]",
            )
            for seconds in ("3599", "2592001", "-1", "x", "1e9", "²", "9" * 500)
        ),
    ],
)
def test_a_bad_expiry_is_refused_by_name(
    client: TestClient, fields: dict[str, str], param: str
) -> None:
    answer = client.post(
        "/v1/files", files={"file": ("a", b"x")}, data={"purpose": "batch", **fields}
    )
    assert error_of(answer, 400)["param"] == param


def test_an_expired_file_is_gone(site: Site, client: TestClient) -> None:
    fields = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    made = upload(client, b"x", **fields)
    assert made["expires_at"] == made["created_at"] + 3600
    site.clock.at += 3601
    error_of(client.get(f"/v1/files/{made['id']}"), 404)


@pytest.mark.parametrize(
    ("offered", "kept"),
    [
        ("../../etc/passwd", "passwd"),
        ("/etc/passwd", "passwd"),
        ("C:\\\\temp\\\\in.jsonl", "in.jsonl"),
        ("..", "upload.jsonl"),
        ("", "upload.jsonl"),
        ("\x1b[31mred\x00.jsonl", "[31mred.jsonl"),
        ("häß 日本.jsonl", "häß 日本.jsonl"),
        ("a\u202egnp.exe", "agnp.exe"),
        ("x" * 400 + ".jsonl", "x" * 194 + ".jsonl"),
    ],
)
def test_a_filename_plays_no_tricks(
    site: Site, client: TestClient, offered: str, kept: str
) -> None:
    made = post(client, PURPOSE + part("file", b"x", offered) + END).json()  # type: ignore[attr-defined]
    assert made["filename"] == kept
    assert site.store.file("acme", made["id"]).blob_key == f"files/{made['id']}"


def test_nothing_is_left_when_the_file_cannot_be_recorded(
    site: Site, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*args: object) -> None:
        raise Unavailable("The database is away.")

    monkeypatch.setattr(site.store, "add_file", away)
    error_of(post(client, PURPOSE + part("file", b"x", "a") + END), 503)
    assert not leftovers(site)


def test_bytes_that_may_be_left_without_a_record_are_known_to_retention(
    site: Site, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*args: object) -> None:
        raise Unavailable("The database is away.")

    with monkeypatch.context() as outage:
        outage.setattr(site.store, "add_file", away)
        outage.setattr(site.store, "file", away)
        error_of(post(client, PURPOSE + part("file", b"x", "a") + END), 503)
    site.clock.at += 1
    (key,) = site.store.unowned_blobs(0.0)
    with site.blobs.open(key) as left:
        assert left.read() == b"x"


def test_what_is_uploaded_and_what_is_deleted_leave_no_blob_without_a_file(
    site: Site, client: TestClient
) -> None:
    kept, gone = upload(client, b"x"), upload(client, b"y")
    client.delete(f"/v1/files/{gone['id']}")
    site.clock.at += 1
    assert site.store.unowned_blobs(0.0) == []
    assert client.get(f"/v1/files/{kept['id']}/content").content == b"x"


def test_a_full_disk_is_a_503_and_leaves_nothing(
    site: Site, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: MultipartUpload, pieces: list[bytes]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(MultipartUpload, "feed", full)
    answer = post(client, PURPOSE + part("file", b"x", "a") + END)
    assert error_of(answer, 503)["code"] == "storage_unavailable"
    assert not leftovers(site)


def test_nothing_is_left_of_an_upload_whose_client_went_away(site: Site) -> None:
    head = (
        "POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-length: 2000000\r\n"
        f"authorization: Bearer {site.key()}\r\n"
        "content-type: multipart/form-data; boundary=b\r\n\r\n"
    ).encode()
    with site.served() as url:
        port = int(url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(head + PURPOSE + part("file", b"x" * 1_500_000, "a"))
            wait_until(lambda: bool(leftovers(site)))
        wait_until(lambda: not leftovers(site))


def test_a_deleted_file_is_gone_with_its_bytes(site: Site, client: TestClient) -> None:
    made = upload(client, b"x")
    assert client.delete(f"/v1/files/{made['id']}").json() == {
        "id": made["id"],
        "object": "file",
        "deleted": True,
    }
    error_of(client.get(f"/v1/files/{made['id']}/content"), 404)
    error_of(client.delete(f"/v1/files/{made['id']}"), 404)
    assert not leftovers(site)


def test_a_file_deleted_after_intake_does_not_stop_its_batch(
    site: Site, client: TestClient
) -> None:
    batch = submit(client, input_file("a"))
    site.read_in()
    client.delete(f"/v1/files/{batch['input_file_id']}")
    site.run()
    site.write_out()
    assert client.get(f"/v1/batches/{batch['id']}").json()["status"] == "completed"


def test_content_lost_from_the_storage_is_a_404_that_names_no_path(
    site: Site, client: TestClient
) -> None:
    made = upload(client, b"x")
    site.blobs.delete(f"files/{made['id']}")
    error = error_of(client.get(f"/v1/files/{made['id']}/content"), 404)
    assert "files/" not in error["message"]


def test_remains_of_broken_uploads_are_swept_at_the_start(site: Site) -> None:
    spool = site.settings.data_dir / "spool"
    handle, written = make_scratch(spool)
    (spool / "left.part").write_bytes(b"x")
    with site.client():
        assert leftovers(site) == [written]
    os.close(handle)


def test_a_record_whose_commit_lost_its_answer_keeps_its_bytes(
    site: Site, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_file = site.store.add_file

    def recorded_and_silent(record: FileRecord) -> None:
        add_file(record)
        raise Unavailable("The connection was lost.")

    monkeypatch.setattr(site.store, "add_file", recorded_and_silent)
    error_of(post(client, PURPOSE + part("file", b"kept", "a") + END), 503)
    (recorded,) = client.get("/v1/files").json()["data"]
    assert client.get(f"/v1/files/{recorded['id']}/content").content == b"kept"
