"""Where the bytes of files lie: a local folder, or anything fsspec reaches."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, cast

import fsspec

from qlm_batch.domain.errors import ConfigurationError, InvalidInput, NotFound, Unavailable
from qlm_batch.domain.ports import BlobStore
from qlm_batch.failpoints import failpoint
from qlm_batch.intake.scratch import make_scratch
from qlm_batch.settings import Settings

_COPY_BYTES = 1024 * 1024


class LocalBlobs:
    """Blobs as files under a folder. They appear by rename, so that readers see all or nothing.

    `scratch` holds what is being written; after a crash leftovers stay there.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self.scratch = root / ".scratch"

    @contextlib.contextmanager
    def create(self, key: str) -> Iterator[BinaryIO]:
        """A writer; the blob appears under `key`, on disk, when the block ends without an error."""
        target = self._path(key)
        with _storage(f"write {key}"), _scratch_file(self.scratch) as (file, scratch):
            yield file
            _settle(file)
            _publish(scratch, target)

    def adopt(self, key: str, path: str) -> None:
        """Move a finished local file in; across devices it is copied first."""
        target, source = self._path(key), Path(path)
        with _storage(f"store {key}"):
            try:
                with source.open("rb") as file:
                    os.fsync(file.fileno())
                _publish(source, target)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                with self.create(key) as out, source.open("rb") as file:
                    shutil.copyfileobj(file, out, _COPY_BYTES)
                source.unlink()

    @contextlib.contextmanager
    def open(self, key: str) -> Iterator[BinaryIO]:
        """A reader; NotFound when absent."""
        try:
            file = self._path(key).open("rb")
        except FileNotFoundError:
            raise _absent(key) from None
        with file:
            yield file

    def delete(self, key: str) -> None:
        """Remove; absent is fine."""
        with _storage(f"delete {key}"):
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._root / _checked(key)


class FsspecBlobs:
    """Blobs behind an fsspec URL, written to the local folder `scratch` and then uploaded whole.

    Object stores show an upload only when it is complete; other file systems may not.
    ConfigurationError for a URL of no file system known or installed here.
    """

    def __init__(self, url: str, scratch: Path) -> None:
        try:
            self._fs, self._prefix = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigurationError(
                f"QLM_BLOB_URL cannot be used: {error}", param="blob_url"
            ) from error
        self.scratch = scratch

    @contextlib.contextmanager
    def create(self, key: str) -> Iterator[BinaryIO]:
        """A writer; the upload starts when the block ends without an error."""
        target = self._path(key)
        with _storage(f"write {key}"), _scratch_file(self.scratch) as (file, scratch):
            yield file
            file.flush()
            self._upload(scratch, target)

    def adopt(self, key: str, path: str) -> None:
        """Upload a finished local file and remove it."""
        with _storage(f"store {key}"):
            self._upload(Path(path), self._path(key))
            Path(path).unlink()

    @contextlib.contextmanager
    def open(self, key: str) -> Iterator[BinaryIO]:
        """A reader; NotFound when absent."""
        with _storage(f"read {key}"):
            try:
                file = self._fs.open(self._path(key), "rb")
            except FileNotFoundError:
                raise _absent(key) from None
            with file:
                yield cast(BinaryIO, file)

    def delete(self, key: str) -> None:
        """Remove; absent is fine."""
        with _storage(f"delete {key}"), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(key))

    def _upload(self, source: Path, target: str) -> None:
        self._fs.makedirs(self._fs._parent(target), exist_ok=True)
        self._fs.put_file(str(source), target)

    def _path(self, key: str) -> str:
        return f"{self._prefix.rstrip('/')}/{_checked(key)}"


def make_blobs(settings: Settings) -> BlobStore:
    """The blob store the settings name."""
    if settings.blob_url:
        return FsspecBlobs(settings.blob_url, settings.data_dir / "scratch")
    return LocalBlobs(settings.data_dir / "blobs")


@contextlib.contextmanager
def _scratch_file(folder: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A fresh file, gone after the block unless it was moved away."""
    handle, path = make_scratch(folder)
    try:
        with cast(IO[bytes], os.fdopen(handle, "wb", buffering=_COPY_BYTES)) as file:
            yield cast(BinaryIO, file), path
    finally:
        path.unlink(missing_ok=True)


def _settle(file: BinaryIO) -> None:
    failpoint("blob.write")
    file.flush()
    os.fsync(file.fileno())


def _publish(source: Path, target: Path) -> None:
    """Rename into place and make the name itself durable."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def _storage(action: str) -> Iterator[None]:
    """Report a failing disk or object store as Unavailable."""
    try:
        yield
    except OSError as error:
        raise Unavailable(
            f"The file storage could not {action}: {error.strerror or error}. "
            "Check its disk space and permissions.",
            code="storage_unavailable",
        ) from error


def _absent(key: str) -> NotFound:
    return NotFound(f"No stored bytes under {key!r}.", code="file_not_found")


def _checked(key: str) -> str:
    """The key, unless it could point outside the store."""
    path = PurePosixPath(key)
    if not key or "\0" in key or path.is_absolute() or any(p.startswith(".") for p in path.parts):
        raise InvalidInput(f"{key!r} is not a usable blob key.")
    return str(path)
