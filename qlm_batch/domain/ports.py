"""What the core needs from outside beside the store: blobs, messages and a clock."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import BinaryIO, Protocol

from qlm_batch.domain.messages import Assigned, Interactive, Stopped


class BlobStore(Protocol):
    """Bytes of files, written once."""

    def create(self, key: str) -> AbstractContextManager[BinaryIO]:
        """A writer; the blob appears under `key` only when the block ends without an error."""
        ...

    def adopt(self, key: str, path: str) -> None:
        """Take over a finished local file as the blob `key`; the local file is gone afterwards."""
        ...

    def open(self, key: str) -> AbstractContextManager[BinaryIO]:
        """A reader. NotFound when absent."""
        ...

    def delete(self, key: str) -> None:
        """Remove; absent is fine."""
        ...


class Dispatcher(Protocol):
    """Hints to workers. They may be lost; the store is the truth."""

    def assigned(self, message: Assigned) -> None:
        """Tell an instance that slices wait for it."""
        ...

    def stopped(self, message: Stopped) -> None:
        """Tell every worker that a batch's slices were closed."""
        ...


class Courier(Protocol):
    """Carries interactive requests to workers."""

    def interactive(self, message: Interactive) -> None:
        """Send a call to its instance, ahead of all hints. Unavailable when it cannot be sent."""
        ...


class Clock(Protocol):
    """Time for the loops of one process: never compared with another machine's."""

    def now(self) -> float:
        """Monotonic seconds."""
        ...

    def sleep(self, seconds: float) -> None:
        """Wait; a virtual clock advances instead."""
        ...
