"""How vLLM is set up where a model runs on the host's processor. Why: docs/decisions/0013."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

import psutil

BYTES_PER_THREAD: Final = 16 * 1024**2
"""Weights that a step reads for each thread that takes part in it."""

BLOCK_TOKENS: Final = 32
"""Tokens of a block of keys and values, in which vLLM's own choice is 128: what a request that gave
way had in its last block is computed again."""
_ONE_PROCESS: Final = "qlm_workers.one_process.OneProcess"
"""Runs the model in the process that schedules. vLLM takes two; there the one spins through each
step of the other, on a core the step could use."""
_PARALLEL: Final = {
    "distributed_executor_backend",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "prefill_context_parallel_size",
}
"""Settings under which several processes run a model."""

_THREADS: Final = "OMP_NUM_THREADS"
_threads_given: Final = _THREADS in os.environ


def engine_args(given: Mapping[str, object]) -> dict[str, object]:
    """vLLM's arguments on a processor, beside those given by the user."""
    chosen: dict[str, object] = {"block_size": BLOCK_TOKENS}
    if _PARALLEL.isdisjoint(given):
        chosen["distributed_executor_backend"] = _ONE_PROCESS
    return chosen


def prepare(weight_bytes: int, *, eager: bool) -> None:
    """Set the environment of an engine about to be started; what the user set stays.

    A small model's steps are over before a further thread is awake; 0 bytes stands for a model
    whose size is not known.
    """
    if not _threads_given:
        os.environ[_THREADS] = str(threads_for(weight_bytes, _cores()))
    # Threads that wait for one another spin about as long as a wake-up takes: longer, and they
    # stand in the way of whatever else has to run before the step can go on.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    if eager:
        # Else the first request with logprobs has all others wait for a C++ compiler.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")


def threads_for(weight_bytes: int, cores: int) -> int:
    """Threads that pay for a model's steps, at least one and at most a core each."""
    return max(1, min(cores, weight_bytes // BYTES_PER_THREAD if weight_bytes else cores))


def _cores() -> int:
    """Physical cores this process may use."""
    usable = len(os.sched_getaffinity(0))
    return min(usable, psutil.cpu_count(logical=False) or usable)
