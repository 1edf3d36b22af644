"""How many of a worker's models fit its device at the same time."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import psutil

from qlm_batch.settings import Settings
from qlm_workers.naming import located, parse_model

CPU_KV_BYTES: Final = 1024**3
"""Key-value cache on a host processor unless the settings say otherwise; vLLM would take nearly
all memory."""
GPU_SHARE: Final = 0.92
"""The share of a GPU's memory one engine takes unless `gpu_memory_utilization` says otherwise."""
PROCESS_BYTES: Final = 1024**3
"""What an engine's processes need besides weights and cache on a host processor."""
_SPARE: Final = 0.9


def models_that_fit(settings: Settings, *, on_gpu: bool) -> int:
    """How many models may be awake at once: the setting, else what fits, at least 1.

    Only engines inside the worker are counted; a server's models are its own affair.
    """
    hosted = len(settings.models)
    if settings.models_awake is not None:
        return min(hosted, settings.models_awake)
    if settings.engine != "vllm" or hosted < 2:
        return hosted
    if on_gpu:
        share = settings.engine_args.get("gpu_memory_utilization", GPU_SHARE)
        fits = int(1.0 / share) if isinstance(share, int | float) and share > 0 else 1
        return max(1, min(hosted, fits))
    free = _SPARE * psutil.virtual_memory().available
    each = PROCESS_BYTES + (settings.kv_cache_bytes or CPU_KV_BYTES)
    needs = sorted((each + weights_bytes(model) for model in settings.models), reverse=True)
    fits = 0
    while fits < hosted and sum(needs[: fits + 1]) <= free:
        fits += 1
    return max(1, fits)


def weights_bytes(model: str) -> int:
    """The size of the weights in a model's folder; 0 where it is not a folder here."""
    folder = Path(located(parse_model(model)[0]))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
