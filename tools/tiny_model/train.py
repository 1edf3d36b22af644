"""Train qlm-tiny on two CPU cores: python tools/tiny_model/train.py --out FOLDER."""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

from tokenizer import END, MAX_POSITIONS, PAD, save_tokenizer, vocabulary  # noqa: E402

from qlm_batch.models.prompts import completion_text, draw, split_tokens  # noqa: E402

# Shares of the training samples; the families that take longest to learn get the most.
FAMILY_WEIGHTS: Final[dict[str, float]] = {
    "add": 1.5,
    "subtract": 1.5,
    "sort": 4.0,
    "reverse": 2.0,
    "capital": 1.0,
    "letters": 2.5,
    "extract": 1.0,
    "count": 0.6,
    "table": 0.6,
}
SMALLEST_PART: Final = 4
IGNORED: Final = -100


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids of question, answer and end token, and where the answer starts."""

    ids: list[int]
    answer_start: int


class Samples:
    """An endless, seeded stream of training samples."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._ids = vocabulary()
        self._families = list(FAMILY_WEIGHTS)
        self._weights = list(FAMILY_WEIGHTS.values())

    def take(self, n: int) -> list[Sample]:
        """The next `n` samples, shortest first."""
        samples = []
        for family in self._rng.choices(self._families, self._weights, k=n):
            prompt = draw(family, self._rng, held_out=False)
            question = [self._ids[t] for t in split_tokens(completion_text(prompt.text))]
            answer = [self._ids[t] for t in split_tokens(prompt.answer)]
            samples.append(Sample([*question, *answer, self._ids[END]], len(question)))
        return sorted(samples, key=lambda sample: len(sample.ids))


def by_length(samples: list[Sample]) -> Iterator[list[Sample]]:
    """Cut samples, shortest first, into parts of like length, so that little is padded."""
    part: list[Sample] = []
    for sample in samples:
        if part and len(sample.ids) > 1.4 * len(part[0].ids) and len(part) >= SMALLEST_PART:
            yield part
            part = []
        part.append(sample)
    yield part


def llama_config() -> LlamaConfig:
    """About 0.9 million parameters; the head size is one that vLLM's attention kernels take."""
    ids = vocabulary()
    return LlamaConfig(
        vocab_size=len(ids),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=ids[END],
        pad_token_id=ids[PAD],
        dtype="float32",
    )


def packed_loss(model: LlamaForCausalLM, samples: list[Sample]) -> Tensor:
    """Summed loss over the answers; an answer's tokens together weigh the root of their number."""
    width = max(len(sample.ids) for sample in samples)
    ids = torch.zeros(len(samples), width, dtype=torch.long)
    weights = torch.zeros(len(samples), width)
    for row, sample in enumerate(samples):
        length = len(sample.ids)
        ids[row, :length] = torch.tensor(sample.ids)
        weights[row, sample.answer_start : length] = (length - sample.answer_start) ** -0.5
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    weights = weights[:, 1:]
    answer = weights > 0
    logits = model.lm_head(hidden[answer])
    losses = functional.cross_entropy(logits, ids[:, 1:][answer], reduction="none")
    return (losses * weights[answer]).sum()


def optimizers(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(
            matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw", ns_steps=5
        ),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate_factor(step: int, steps: int) -> float:
    """A short warm-up, a flat stretch, and a straight way down to nothing over the last half."""
    return min(1.0, (step + 1) / 50, 2 * (steps - step) / steps)


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write the model as transformers and vLLM load it."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = vocabulary()
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=ids[END], pad_token_id=ids[PAD], bos_token_id=None
    )
    model.save_pretrained(folder)
    save_tokenizer(folder)


def train(
    out: Path, *, steps: int, batch: int, rate: float, seed: int, max_minutes: float
) -> LlamaForCausalLM:
    """Train from random weights and write the model to `out`, now and then and at the end."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(llama_config())
    model.train()
    print(f"parameters: {sum(p.numel() for p in model.parameters())}", flush=True)
    stream = Samples(seed)
    steppers = optimizers(model, rate)
    started = time.monotonic()
    tokens = 0
    running = 0.0
    for step in range(steps):
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = rate * rate_factor(step, steps)
        samples = stream.take(batch)
        tokens += sum(len(sample.ids) for sample in samples)
        scale = sum((len(s.ids) - s.answer_start) ** 0.5 for s in samples)
        total = 0.0
        for part in by_length(samples):
            loss = packed_loss(model, part) / scale
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        running = total if step == 0 else 0.98 * running + 0.02 * total
        minutes = (time.monotonic() - started) / 60
        if step % 50 == 49:
            print(
                f"step {step + 1}/{steps}  loss {running:.4f}  "
                f"{tokens / 1e6:.2f} M tokens  {minutes:.1f} min",
                flush=True,
            )
        if step % 500 == 499:
            save(model, out)
        if minutes > max_minutes:
            print("stopped by the time limit", flush=True)
            break
    save(model, out)
    return model


def main() -> None:
    """Read the options and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=160)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-minutes", type=float, default=20.0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(
        options.out,
        steps=options.steps,
        batch=options.batch,
        rate=options.rate,
        seed=options.seed,
        max_minutes=options.max_minutes,
    )


if __name__ == "__main__":
    main()
