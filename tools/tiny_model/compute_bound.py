"""Write a Llama of random weights that is large enough to be compute-bound on a CPU.

Its answers mean nothing; it is for measuring. It shares the tokenizer of qlm-tiny.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Final

import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from qlm_batch.models import tiny_model_path

HEAD_SIZE: Final = 64
MAX_POSITIONS: Final = 4096


def make(
    path: Path, layers: int = 8, hidden: int = 512, dtype: str = "float32", seed: int = 0
) -> Path:
    """Write the model to the folder `path` and return it; `hidden` is a multiple of 64."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path())
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD_SIZE,
        num_key_value_heads=hidden // HEAD_SIZE,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    shutil.copyfile(tiny_model_path() / "tokenizer.json", path / "tokenizer.json")
    settings = json.loads((tiny_model_path() / "tokenizer_config.json").read_text("utf-8"))
    settings["model_max_length"] = MAX_POSITIONS
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    return path


def main() -> None:
    """Read the options and write the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(make(options.path, options.layers, options.hidden, options.dtype, options.seed))


if __name__ == "__main__":
    main()
