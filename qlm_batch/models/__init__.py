"""Models that ship with the package, found by name."""

from __future__ import annotations

from pathlib import Path
from typing import Final

TINY_MODEL_NAME: Final = "qlm-tiny"


def tiny_model_path() -> Path:
    """The folder of the shipped model, laid out as transformers and vLLM load it."""
    return Path(__file__).resolve().parent / TINY_MODEL_NAME


def resolve_model(name: str) -> str:
    """The path that `name` stands for if it names a shipped model; any other name unchanged."""
    return str(tiny_model_path()) if name == TINY_MODEL_NAME else name
