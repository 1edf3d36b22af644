"""What is chosen for vLLM on a processor."""

from __future__ import annotations

import pytest

from qlm_workers.processor import BYTES_PER_THREAD, engine_args, threads_for


@pytest.mark.parametrize(
    ("weights", "cores", "threads"),
    [(1, 8, 1), (2 * BYTES_PER_THREAD, 8, 2), (10**12, 8, 8), (0, 8, 8), (10**12, 1, 1)],
)
def test_a_small_model_takes_few_threads_and_one_of_unknown_size_all_cores(
    weights: int, cores: int, threads: int
) -> None:
    assert threads_for(weights, cores) == threads


def test_a_model_runs_in_one_process_unless_several_are_asked_for() -> None:
    assert "distributed_executor_backend" in engine_args({})
    assert "distributed_executor_backend" not in engine_args({"tensor_parallel_size": 2})
    assert "distributed_executor_backend" not in engine_args({"distributed_executor_backend": "mp"})
