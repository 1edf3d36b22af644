"""Who leads, as known to the services of one process."""

from __future__ import annotations


class Leadership:
    """The epoch this process leads in, shared by the scheduler loop and the reaper.

    It is only what was last heard: every write is fenced by the epoch in the store.
    """

    def __init__(self) -> None:
        self._epoch: int | None = None

    @property
    def epoch(self) -> int | None:
        """The epoch while leading, else None."""
        return self._epoch

    def lead(self, epoch: int) -> None:
        """Leadership was taken or renewed."""
        self._epoch = epoch

    def step_down(self) -> None:
        """Leadership was lost or given up."""
        self._epoch = None
