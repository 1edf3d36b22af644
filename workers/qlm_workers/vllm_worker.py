"""What is brought into the process in which vLLM runs the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

import qlm_workers.quick_exit  # noqa: F401 - this runs in the model's process


class Extension:
    """Named as vLLM's `worker_extension_cls`, has this module imported there."""


def without_discarded(sample: Callable[..., Any]) -> Callable[..., Any]:
    """`sample` of a model runner, in which requests whose token is thrown away draw no number.

    A prompt computed in several steps has a token sampled in each, which vLLM throws away. It then
    sets the request's generator back by its offset; those of a processor have none, and the engine
    dies. A generator that is not used needs no setting back.
    """

    def sample_tokens(runner: Any, *args: Any, **kwargs: Any) -> Any:
        batch = runner.input_batch
        discarded = runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist()
        unused = {at: batch.generators.pop(at) for at in discarded if at in batch.generators}
        try:
            return sample(runner, *args, **kwargs)
        finally:
            batch.generators.update(unused)

    return sample_tokens


if not torch.cuda.is_available() and hasattr(GPUModelRunner, "sample_tokens"):
    GPUModelRunner.sample_tokens = without_discarded(GPUModelRunner.sample_tokens)
