"""How long a step takes on devices we do not have: fits to published profiles of vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of one engine step: base + per_sequence·B + per_kv_token·KV + per_prefill_token·P."""

    base: float
    per_sequence: float
    per_kv_token: float
    per_prefill_token: float

    def seconds(self, sequences: int, kv_tokens: int, prefill_tokens: int) -> float:
        """How long a step with this load takes."""
        return (
            self.base
            + self.per_sequence * sequences
            + self.per_kv_token * kv_tokens
            + self.per_prefill_token * prefill_tokens
        )


DEVICES: Mapping[str, StepTimes] = {
    "llama-2-7b/a100": StepTimes(9.8e-3, 4.4e-6, 5.0e-7, 6.3e-5),
    "llama-2-7b/h100": StepTimes(6.4e-3, 4.4e-6, 3.1e-7, 2.0e-5),
    "llama-2-7b/a10-extrapolated": StepTimes(31e-3, 4.4e-6, 1.7e-6, 1.54e-4),
    "mistral-7b/a100": StepTimes(10.5e-3, 4.4e-6, 1.3e-7, 6.3e-5),
    "mistral-7b/h100": StepTimes(6.8e-3, 4.4e-6, 8.0e-8, 2.0e-5),
    "mistral-7b/a10-extrapolated": StepTimes(33e-3, 4.4e-6, 4.3e-7, 1.54e-4),
    "llama-2-70b/a100-tp4": StepTimes(43.2e-3, 2.0e-4, 3.9e-7, 1.8e-4),
    "llama-2-70b/h100-tp4": StepTimes(28.7e-3, 2.7e-4, 1.2e-7, 9.0e-5),
}
"""Step times per model and device, fitted to published profiles of vLLM."""
DEFAULT_DEVICE = "mistral-7b/a100"
