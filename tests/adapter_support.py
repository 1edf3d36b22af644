"""LoRA adapters made by hand, as peft saves them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from qlm_batch.models import tiny_model_path


def write_adapter(folder: Path, *, scale: float, rank: int = 4, seed: int = 0) -> Path:
    """An adapter of the shipped model with random weights; at scale 0 it changes nothing."""
    config = json.loads((tiny_model_path() / "config.json").read_text())
    hidden = config["hidden_size"]
    draw = np.random.default_rng(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        place = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        shape_a, shape_b = (rank, hidden), (hidden, rank)
        weights[f"{place}.lora_A.weight"] = draw.standard_normal(shape_a).astype(np.float32)
        weights[f"{place}.lora_B.weight"] = (scale * draw.standard_normal(shape_b)).astype(
            np.float32
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "r": rank,
                "lora_alpha": rank,
                "target_modules": ["q_proj"],
                "bias": "none",
                "task_type": "CAUSAL_LM",
            }
        )
    )
    return folder
