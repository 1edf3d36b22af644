"""What the routes work with."""

from __future__ import annotations

from dataclasses import dataclass

from qlm_batch.control.interactive import Calls
from qlm_batch.domain.ports import BlobStore, Dispatcher
from qlm_batch.domain.store import Store
from qlm_batch.settings import Settings


@dataclass(frozen=True)
class ApiServices:
    """The parts behind the routes. Without a `dispatcher`, cancels reach workers a little later;
    without `calls`, nothing is answered interactively."""

    store: Store
    blobs: BlobStore
    settings: Settings
    dispatcher: Dispatcher | None = None
    calls: Calls | None = None
