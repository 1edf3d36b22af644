"""Score qlm-tiny on held-out prompts through vLLM; the last line printed is JSON.

Exits with 1 where a family is below 95 % right.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from qlm_batch.models import tiny_model_path
from qlm_batch.models.prompts import (
    FAMILIES,
    TRAINING_FAMILIES,
    Prompt,
    completion_text,
    held_out,
    is_right,
)

ENOUGH: Final = 0.95
KV_CACHE_BYTES: Final = 1 << 30


def open_engine(model: Path, dtype: str) -> Any:
    """A vLLM engine that serves `model` in this process's children."""
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    from vllm import LLM

    return LLM(
        model=str(model),
        dtype=dtype,
        enforce_eager=True,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        max_num_seqs=64,
        seed=0,
    )


def ask(engine: Any, prompts: list[Prompt], form: str) -> list[tuple[str, str, int]]:
    """Greedy answers: the text, the finish reason and the number of output tokens of each."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=512)
    if form == "chat":
        messages = [[{"role": "user", "content": prompt.text}] for prompt in prompts]
        outputs = engine.chat(messages, sampling, use_tqdm=False)
    else:
        texts = [completion_text(prompt.text) for prompt in prompts]
        outputs = engine.generate(texts, sampling, use_tqdm=False)
    answers = (output.outputs[0] for output in outputs)
    return [(a.text, str(a.finish_reason), len(a.token_ids)) for a in answers]


def score(engine: Any, family: str, form: str, n: int, seed: int) -> tuple[float, list[str]]:
    """The share of `n` held-out prompts answered right, and the wrong answers as lines."""
    prompts = held_out(family, n, seed)
    wrong: list[str] = []
    for prompt, (text, reason, tokens) in zip(prompts, ask(engine, prompts, form), strict=True):
        right = is_right(prompt, text) and reason == "stop" and tokens == prompt.output_tokens
        if not right:
            wrong.append(f"{prompt.text!r}: {text!r}, not {prompt.answer!r} ({reason}, {tokens})")
    return 1 - len(wrong) / n, wrong


def main() -> int:
    """Read the options, score each family, and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=tiny_model_path())
    parser.add_argument("--n", type=int, default=300, help="held-out prompts per family")
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument(
        "--families", nargs="+", choices=(*FAMILIES, *TRAINING_FAMILIES), default=FAMILIES
    )
    parser.add_argument("--form", choices=("chat", "completions"), default="chat")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--show-wrong", type=int, default=0, help="wrong answers to print")
    options = parser.parse_args()
    engine = open_engine(options.model, options.dtype)
    shares: dict[str, float] = {}
    for family in options.families:
        share, wrong = score(engine, family, options.form, options.n, options.seed)
        shares[family] = round(share, 4)
        print(f"{family}: {share:.4f} of {options.n}", flush=True)
        for line in wrong[: options.show_wrong]:
            print(f"  {line}", flush=True)
    # The engine's processes share this one's output: ended first, they cannot print after the JSON.
    engine.llm_engine.engine_core.shutdown()
    print(json.dumps({"families": shares}), flush=True)
    return 0 if min(shares.values()) >= ENOUGH else 1


if __name__ == "__main__":
    sys.exit(main())
