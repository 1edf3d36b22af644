"""The names under which the evicting scheduler's counts reach the engine's front end.

They stand in vLLM's statistics of a step, in `waiting_lora_adapters`.
"""

from __future__ import annotations

from typing import Final

EVICTIONS: Final = "qlm_evictions"
"""How often a request gave way, since the start."""

RECOMPUTED: Final = "qlm_recomputed_tokens"
"""Tokens computed again by requests that gave way, since the start."""

STEP_US: Final = "qlm_step_us"
"""What a step took, in microseconds, where vLLM cannot tell."""
