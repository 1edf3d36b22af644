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

from qlm_batch.models.prompts import Prompt, completion_text, draw, split_tokens  # noqa: E402


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of training: its length, samples per step, and each family's share of them."""

    steps: int
    batch: int
    shares: dict[str, float]
    keep_long: float
    """The share kept of the answers longer than LONG_TOKENS."""
    anneal: bool
    """Whether the rate falls to nothing over the last half."""
    slow_down: float = 1.0
    """What the rate is divided by."""


# The first phase learns to read and copy, the second to add up and to know where to stop; the third
# gives most to what takes longest, and lowers the rate; the last teaches where a table ends.
PHASES: Final = (
    Phase(
        steps=500,
        batch=128,
        shares={
            "add": 2.5,
            "subtract": 2.5,
            "sort": 3.0,
            "reverse": 1.5,
            "capital": 1.0,
            "letters": 2.5,
            "extract": 1.0,
            "count": 0.9,
            "table": 0.7,
        },
        keep_long=1.0,
        anneal=False,
    ),
    Phase(
        steps=500,
        batch=192,
        shares={
            "add": 5.0,
            "subtract": 6.0,
            "sort": 2.0,
            "reverse": 1.0,
            "capital": 1.0,
            "letters": 4.0,
            "extract": 1.0,
            "count": 2.5,
            "table": 1.5,
        },
        keep_long=0.3,
        anneal=False,
    ),
    Phase(
        steps=1100,
        batch=192,
        shares={
            "add": 3.0,
            "subtract": 5.0,
            "sort": 5.0,
            "reverse": 1.0,
            "capital": 1.5,
            "letters": 6.0,
            "extract": 1.5,
            "count": 2.0,
            "table": 1.5,
        },
        keep_long=0.4,
        anneal=True,
    ),
    Phase(
        steps=300,
        batch=128,
        shares={
            "add": 1.0,
            "subtract": 1.0,
            "sort": 1.0,
            "reverse": 1.5,
            "capital": 1.0,
            "letters": 1.5,
            "extract": 0.7,
            "count": 1.5,
            "table": 4.0,
            "rows": 4.5,
        },
        keep_long=0.2,
        anneal=True,
        slow_down=2.0,
    ),
)
LONG_TOKENS: Final = 120
SMALLEST_PART: Final = 4
IGNORED: Final = -100


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids of question, answer and end token, and where the answer starts."""

    ids: list[int]
    answer_start: int

    @property
    def weights(self) -> list[float]:
        """Each token's share in the loss: the end weighs 1, n answer tokens together their root."""
        answer = len(self.ids) - self.answer_start
        return [0.0] * self.answer_start + [answer**-0.5] * (answer - 1) + [1.0]


class Samples:
    """An endless, seeded stream of training samples."""

    def __init__(self, phase: Phase, seed: int) -> None:
        self._rng = random.Random(seed)
        self._ids = vocabulary()
        self._phase = phase

    def _prompt(self, family: str) -> Prompt:
        while True:
            prompt = draw(family, self._rng, held_out=False)
            keep = self._phase.keep_long if prompt.output_tokens > LONG_TOKENS else 1.0
            if keep == 1.0 or self._rng.random() < keep:
                return prompt

    def take(self, n: int) -> list[Sample]:
        """The next `n` samples, shortest first."""
        samples = []
        shares = self._phase.shares
        for family in self._rng.choices(list(shares), list(shares.values()), k=n):
            prompt = self._prompt(family)
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


def weighted_loss(model: LlamaForCausalLM, samples: list[Sample]) -> Tensor:
    """Weighted sum of the losses of the answers' tokens."""
    width = max(len(sample.ids) for sample in samples)
    ids = torch.zeros(len(samples), width, dtype=torch.long)
    weights = torch.zeros(len(samples), width)
    for row, sample in enumerate(samples):
        length = len(sample.ids)
        ids[row, :length] = torch.tensor(sample.ids)
        weights[row, :length] = torch.tensor(sample.weights)
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


def rate_factor(step: int, phase: Phase) -> float:
    """A short warm-up, a flat stretch, and where asked a straight way down over the last half."""
    factor = min(1.0, (step + 1) / 50)
    return min(factor, 2 * (phase.steps - step) / phase.steps) if phase.anneal else factor


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write the model as transformers and vLLM load it."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = vocabulary()
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=ids[END], pad_token_id=ids[PAD], bos_token_id=None
    )
    model.save_pretrained(folder)
    save_tokenizer(folder)
    for file in folder.iterdir():
        file.chmod(0o644)


def run_phase(model: LlamaForCausalLM, phase: Phase, rate: float, seed: int, out: Path) -> None:
    """Train for one phase and write the model to `out`, now and then and at the end."""
    stream = Samples(phase, seed)
    steppers = optimizers(model, rate)
    started = time.monotonic()
    tokens = 0
    running = 0.0
    for step in range(phase.steps):
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = rate * rate_factor(step, phase) / phase.slow_down
        samples = stream.take(phase.batch)
        tokens += sum(len(sample.ids) for sample in samples)
        scale = sum(sum(sample.weights) for sample in samples)
        total = 0.0
        for part in by_length(samples):
            loss = weighted_loss(model, part) / scale
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        running = total if step == 0 else 0.98 * running + 0.02 * total
        if step % 50 == 49:
            minutes = (time.monotonic() - started) / 60
            print(
                f"step {step + 1}/{phase.steps}  loss {running:.4f}  "
                f"{tokens / 1e6:.2f} M tokens  {minutes:.1f} min",
                flush=True,
            )
        if step % 250 == 249:
            save(model, out)
    save(model, out)


def main() -> None:
    """Read the options and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip", type=int, default=0, help="phases already done to --start")
    parser.add_argument("--start", type=Path, help="model to start from, instead of random weights")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    if options.start:
        model = LlamaForCausalLM.from_pretrained(options.start, dtype=torch.float32)
    else:
        model = LlamaForCausalLM(llama_config())
    model.train()
    print(f"parameters: {sum(p.numel() for p in model.parameters())}", flush=True)
    for number, phase in enumerate(PHASES[options.skip :], start=options.skip):
        print(f"phase {number + 1} of {len(PHASES)}", flush=True)
        run_phase(model, phase, options.rate, options.seed + number, options.out)


if __name__ == "__main__":
    main()
