"""A model run in the process that schedules its steps: vLLM's single-process executor."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from vllm.v1.executor.uniproc_executor import UniProcExecutor


class OneProcess(UniProcExecutor):  # type: ignore[misc]
    """Runs a step when its result is asked for, so that the time vLLM tells of it is the step's.

    vLLM takes the time from there on, expecting that another process runs the step meanwhile.
    """

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """The step's output or, with `non_block`, a future of it."""
        run = partial(super().execute_model, scheduler_output)
        return _Deferred(run) if non_block else run()


class _Deferred(Future[Any]):
    def __init__(self, run: Callable[[], Any]) -> None:
        super().__init__()
        self._run = run

    def result(self, timeout: float | None = None) -> Any:
        if not self.done():
            try:
                self.set_result(self._run())
            except Exception as error:  # noqa: BLE001  raised below
                self.set_exception(error)
        return super().result(timeout)
