"""Blob stores: all or nothing, whatever the place."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest

from qlm_batch.domain.errors import InvalidInput, NotFound, Unavailable
from qlm_batch.domain.ports import BlobStore
from qlm_batch.intake.blobs import FsspecBlobs, LocalBlobs, make_blobs
from qlm_batch.settings import Settings

Make = Callable[[Path], BlobStore]
KINDS: list[Make] = [
    lambda path: LocalBlobs(path / "blobs"),
    lambda path: FsspecBlobs(f"memory://{uuid4()}", path / "scratch"),
    lambda path: FsspecBlobs(f"file://{path}/remote", path / "scratch"),
]


@pytest.fixture(params=KINDS, ids=["local", "memory", "file url"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    make: Make = request.param
    return make(tmp_path)


def put(blobs: BlobStore, key: str, data: bytes) -> None:
    with blobs.create(key) as file:
        file.write(data)


def get(blobs: BlobStore, key: str) -> bytes:
    with blobs.open(key) as file:
        return file.read()


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_what_is_written_can_be_read_again_and_deleted(blobs: BlobStore) -> None:
    put(blobs, "results/batch_1/0/output.jsonl", b"one\n")
    assert get(blobs, "results/batch_1/0/output.jsonl") == b"one\n"
    blobs.delete("results/batch_1/0/output.jsonl")
    blobs.delete("results/batch_1/0/output.jsonl")
    with pytest.raises(NotFound):
        get(blobs, "results/batch_1/0/output.jsonl")


def test_a_blob_is_invisible_until_it_is_whole(blobs: BlobStore) -> None:
    with blobs.create("a") as file:
        file.write(b"half")
        file.flush()
        with pytest.raises(NotFound):
            get(blobs, "a")
    assert get(blobs, "a") == b"half"


def test_a_write_that_fails_leaves_nothing_behind(blobs: BlobStore, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stop"), blobs.create("a") as file:
        file.write(b"half")
        raise ValueError("stop")
    with pytest.raises(NotFound):
        get(blobs, "a")
    assert leftovers(tmp_path) == []


def test_writing_again_replaces_the_blob(blobs: BlobStore) -> None:
    put(blobs, "a", b"first")
    put(blobs, "a", b"second")
    assert get(blobs, "a") == b"second"


def test_an_adopted_file_moves_in(blobs: BlobStore, tmp_path: Path) -> None:
    spool = tmp_path / "upload"
    spool.write_bytes(b"data")
    blobs.adopt("files/file-1", str(spool))
    assert get(blobs, "files/file-1") == b"data"
    assert not spool.exists()


def test_a_file_on_another_device_is_copied_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = tmp_path / "upload"
    spool.write_bytes(b"data")
    rename = Path.replace

    def across_devices(self: Path, target: Path) -> Path:
        if self == spool:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", across_devices)
    blobs = LocalBlobs(tmp_path / "blobs")
    blobs.adopt("a", str(spool))
    assert get(blobs, "a") == b"data"
    assert not spool.exists()


def test_a_full_disk_is_reported_as_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Unavailable, match="No space left"):
        put(LocalBlobs(tmp_path), "a", b"data")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("key", ["", "../a", "a/../../b", "/etc/passwd", "a\0b", ".scratch/x"])
def test_a_key_cannot_leave_the_store(blobs: BlobStore, key: str) -> None:
    with pytest.raises(InvalidInput):
        put(blobs, key, b"data")


def test_the_settings_choose_the_place(tmp_path: Path) -> None:
    local = make_blobs(Settings(data_dir=tmp_path))
    put(local, "a", b"here")
    assert (tmp_path / "blobs" / "a").read_bytes() == b"here"
    remote = make_blobs(Settings(data_dir=tmp_path, blob_url="memory://chosen"))
    put(remote, "a", b"there")
    assert fsspec.filesystem("memory").cat("/chosen/a") == b"there"
