"""A Llama of a real one's shape whose weights vLLM makes up, so that nothing has to be fetched.

Its tokenizer is the shipped model's, with words that no prompt holds up to the size of the real
vocabulary: the output layer, sampling and grammars cost what they cost there. Serve it with
`load_format` at `dummy`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from qlm_batch.models import tiny_model_path

DUMMY = {"load_format": "dummy"}
"""vLLM's argument that goes with these models."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int = 128_256


SHAPES = {
    "llama-1b": Shape(2048, 16, 32, 8, 8192),
    "llama-8b": Shape(4096, 32, 32, 8, 14336),
}
"""Those of Llama 3.2 1B (without shared embeddings) and of Llama 3.1 8B."""

_POSITIONS = 8192


def make(path: Path, shape: Shape) -> Path:
    """Write the model's folder, and return it."""
    shipped = tiny_model_path()
    path.mkdir(parents=True)
    for name in ("tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(shipped / name, path / name)
    tokenizer = json.loads((shipped / "tokenizer.json").read_text("utf-8"))
    words = tokenizer["model"]["vocab"]
    words |= {f" w{number}": number for number in range(len(words), shape.vocabulary)}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    config = json.loads((shipped / "config.json").read_text("utf-8")) | {
        "dtype": "bfloat16",
        "head_dim": shape.hidden // shape.heads,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": _POSITIONS,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
    }
    (path / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    return path
