"""Write examples/*.jsonl and examples/answers.json from held-out prompts, the same each time."""

from __future__ import annotations

import argparse
import json
import random
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

REPOSITORY: Final = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from qlm_batch.models.prompts import (  # noqa: E402
    FAMILIES,
    LONG_FAMILIES,
    Prompt,
    chat_body,
    completion_body,
    held_out,
    long_output,
)

# Upper bounds in tokens of the long answers, so that lengths spread over the whole range.
LENGTH_BOUNDS: Final = (10, 25, 50, 100, 150, 200, 250, 300, 350, 400)


def pick(per_short_family: int, per_length: int, seed: int) -> list[Prompt]:
    """Different prompts of every family in random order, with long answers of every length."""
    prompts: list[Prompt] = []
    for family in FAMILIES:
        if family not in LONG_FAMILIES:
            prompts += held_out(family, per_short_family, seed)
    for low, high in pairwise(LENGTH_BOUNDS):
        prompts += long_output(per_length, seed, low, high)
    distinct = list({prompt.text: prompt for prompt in prompts}.values())
    random.Random(seed).shuffle(distinct)
    return distinct


def line(custom_id: str, url: str, body: dict[str, Any]) -> str:
    """One line of a batch file."""
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def build() -> dict[str, str]:
    """The text of each example file by its name."""
    chat = pick(per_short_family=18, per_length=5, seed=11)
    completions = pick(per_short_family=12, per_length=4, seed=12)
    answers: dict[str, dict[str, str]] = {}
    files: dict[str, list[str]] = {"chat.jsonl": [], "completions.jsonl": []}
    for number, prompt in enumerate(chat, start=1):
        custom_id = f"chat-{number:03}-{prompt.family}"
        body = chat_body(prompt)
        files["chat.jsonl"].append(line(custom_id, "/v1/chat/completions", body))
        answers[custom_id] = entry(prompt)
    for number, prompt in enumerate(completions, start=1):
        custom_id = f"completion-{number:03}-{prompt.family}"
        body = completion_body(prompt)
        files["completions.jsonl"].append(line(custom_id, "/v1/completions", body))
        answers[custom_id] = entry(prompt)
    texts = {name: "\n".join(lines) + "\n" for name, lines in files.items()}
    texts["answers.json"] = json.dumps(answers, indent=1) + "\n"
    return texts


def entry(prompt: Prompt) -> dict[str, str]:
    """What the demo needs to score a line."""
    return {"question": prompt.text, "answer": prompt.answer, "family": prompt.family}


def main() -> None:
    """Read the options and write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "examples")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, text in build().items():
        (options.out / name).write_text(text, encoding="utf-8")
        print(f"{name}: {len(text)} bytes")


if __name__ == "__main__":
    main()
