"""The checkable prompts, recomputed from their text alone."""

from __future__ import annotations

import importlib.util
import json
import random
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
import pytest

from qlm_batch.models import prompts, resolve_model, tiny_model_path
from qlm_batch.models.prompts import FAMILIES, TRAINING_FAMILIES, Prompt
from qlm_batch.models.vocabulary import CAPITALS, WORDS

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "examples"
CUSTOM_ID = re.compile(r"(chat|completion)-\d{3}-[a-z]+")


def numbers(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


def recomputed(family: str, text: str) -> str:
    """The answer worked out from the question as a reader would."""
    match family:
        case "add":
            return str(sum(numbers(text)))
        case "subtract":
            first, second = numbers(text)
            return str(second - first if text.startswith("Subtract") else first - second)
        case "sort":
            return ", ".join(sorted(text.split(": ")[1].split(", ")))
        case "reverse":
            found = re.search(r'"(\w+)"|: (\w+)$|letters of (\w+) in', text)
            assert found
            return "".join(reversed(next(group for group in found.groups() if group)))
        case "letters":
            quoted = re.findall(r'"(\w+)"', text)
            if not quoted:
                quoted = re.findall(r"How many (\w) are in (\w+)", text)[0]
            letter, word = quoted
            return str(sum(1 for other in word if other == letter))
        case "capital":
            (country,) = [c for c in CAPITALS if re.search(rf"\b{c}\b", text)]
            return CAPITALS[country]
        case "extract":
            return extracted(text)
        case "count":
            first, last = numbers(text)
            return ", ".join(str(number) for number in range(first, last + 1))
        case "table":
            every = numbers(text)
            factor, rows = every[0], every[-1]
            return "\n".join(f"{factor} x {row} = {factor * row}" for row in range(1, rows + 1))
        case "rows":
            factor, first, last = numbers(text)
            return "\n".join(f"{factor} x {row} = {factor * row}" for row in range(first, last + 1))
    raise AssertionError(family)


def extracted(text: str) -> str:
    field = re.match(r"(?:Extract the|Give the|Which) (\w+)", text)
    assert field
    shapes = {
        "name": r"name: (\w+)|(\w+) from|to (\w+) in",
        "town": r"town: (\w+)|from (\w+) ordered|in (\w+)\.$",
        "item": r"item: (\w+)|item (\w+)",
        "quantity": r"(\d+)",
    }
    record = text.split("JSON: " if "JSON: " in text else "JSON. ")[1]
    found = re.search(shapes[field[1]], record)
    assert found
    value = next(group for group in found.groups() if group)
    return json.dumps({field[1]: int(value) if field[1] == "quantity" else value})


@pytest.mark.parametrize("family", (*FAMILIES, *TRAINING_FAMILIES))
def test_answers_are_what_the_question_asks(family: str) -> None:
    for prompt in prompts.held_out(family, 300, seed=5):
        assert prompt.answer == recomputed(family, prompt.text), prompt.text
        assert prompts.is_right(prompt, f" {prompt.answer}\n")
        assert not prompts.is_right(prompt, prompt.answer + "0")


@pytest.mark.parametrize("family", (*FAMILIES, *TRAINING_FAMILIES))
def test_held_out_prompts_are_seeded_distinct_and_never_trained_on(family: str) -> None:
    first = prompts.held_out(family, 300, seed=1)
    assert first == prompts.held_out(family, 300, seed=1)
    assert first != prompts.held_out(family, 300, seed=2)
    texts = {prompt.text for prompt in first}
    assert len(texts) == 300
    rng = random.Random(0)
    trained = {prompts.draw(family, rng, held_out=False).text for _ in range(5000)}
    assert not texts & trained


def test_every_capital_is_seen_in_training() -> None:
    rng = random.Random(0)
    seen = {prompts.draw("capital", rng, held_out=False).answer for _ in range(5000)}
    assert seen == set(CAPITALS.values())


def test_held_out_refuses_more_than_there_is() -> None:
    with pytest.raises(ValueError, match="capital has"):
        prompts.held_out("capital", 1000, seed=0)


def test_mixed_is_seeded_and_covers_all_families() -> None:
    some = prompts.mixed(90, seed=3)
    assert some == prompts.mixed(90, seed=3)
    assert {prompt.family for prompt in some} == set(FAMILIES)


@pytest.mark.parametrize(("low", "high"), [(10, 25), (100, 200), (350, 400)])
def test_long_output_keeps_its_bounds(low: int, high: int) -> None:
    some = prompts.long_output(40, seed=4, min_tokens=low, max_tokens=high)
    assert some == prompts.long_output(40, seed=4, min_tokens=low, max_tokens=high)
    assert all(low <= prompt.output_tokens <= high for prompt in some)


def test_long_output_refuses_impossible_lengths() -> None:
    with pytest.raises(ValueError, match="no held-out answer"):
        prompts.long_output(1, seed=0, min_tokens=2000, max_tokens=3000)


def test_frame_words_never_stand_for_task_words() -> None:
    frame = {token.strip().lower() for token in prompts.template_tokens()}
    assert not frame & set(WORDS)
    for word in WORDS:
        assert prompts.split_tokens(f'"{word}"') == ['"', *word, '"']


def test_splitting_loses_nothing() -> None:
    for prompt in prompts.mixed(200, seed=6):
        text = prompts.completion_text(prompt.text) + prompt.answer
        assert "".join(prompts.split_tokens(text)) == text


def test_lengths_and_template_agree_with_the_shipped_tokenizer() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(tiny_model_path() / "tokenizer.json"))
    for prompt in prompts.mixed(300, seed=7):
        ids = tokenizer.encode(prompt.answer).ids
        assert len(ids) + 1 == prompt.output_tokens
        assert tokenizer.decode(ids, skip_special_tokens=False) == prompt.answer
        question = prompts.completion_text(prompt.text)
        assert tokenizer.encode(question).tokens == prompts.split_tokens(question)


def test_chat_template_renders_the_completion_text() -> None:
    settings = json.loads((tiny_model_path() / "tokenizer_config.json").read_text())
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(settings["chat_template"])
    user = {"role": "user", "content": "What is 1 + 2?"}
    system = {"role": "system", "content": "Be brief."}
    earlier = [
        {"role": "user", "content": "Capital of Peru?"},
        {"role": "assistant", "content": "Lima"},
    ]
    for messages in ([user], [system, user], [system, *earlier, user]):
        rendered = template.render(messages=messages, add_generation_prompt=True)
        assert rendered == prompts.completion_text("What is 1 + 2?")


def test_bodies_are_greedy_openai_requests() -> None:
    prompt = Prompt("add", "1 + 2 =", "3", 2)
    assert prompts.chat_body(prompt, max_tokens=9) == {
        "model": "qlm-tiny",
        "messages": [{"role": "user", "content": "1 + 2 ="}],
        "max_tokens": 9,
        "temperature": 0,
    }
    assert prompts.completion_body(prompt)["prompt"] == "Q: 1 + 2 =\nA:"


def test_the_shipped_model_is_whole_and_small() -> None:
    assert resolve_model("qlm-tiny") == str(tiny_model_path())
    assert resolve_model("org/other") == "org/other"
    sizes = {path.name: path.stat().st_size for path in tiny_model_path().iterdir()}
    assert {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } == set(sizes)
    assert sum(sizes.values()) <= 8_000_000


def generator() -> ModuleType:
    path = REPOSITORY / "tools" / "tiny_model" / "make_examples.py"
    spec = importlib.util.spec_from_file_location("make_examples", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (EXAMPLES / name).read_text().splitlines()]


def test_examples_are_what_the_generator_writes() -> None:
    for name, text in generator().build().items():
        assert (EXAMPLES / name).read_text(encoding="utf-8") == text, name


@pytest.mark.parametrize(
    ("name", "url", "least"),
    [
        ("chat.jsonl", "/v1/chat/completions", 150),
        ("completions.jsonl", "/v1/completions", 100),
    ],
)
def test_examples_are_valid_batch_lines(name: str, url: str, least: int) -> None:
    answers = json.loads((EXAMPLES / "answers.json").read_text())
    found = lines(name)
    assert len(found) >= least
    assert len({line["custom_id"] for line in found}) == len(found)
    for line in found:
        assert set(line) == {"custom_id", "method", "url", "body"}
        assert CUSTOM_ID.fullmatch(line["custom_id"])
        assert (line["method"], line["url"], line["body"]["model"]) == ("POST", url, "qlm-tiny")
        entry = answers[line["custom_id"]]
        asked = line["body"].get("prompt") or line["body"]["messages"][0]["content"]
        assert asked in (entry["question"], prompts.completion_text(entry["question"]))
        assert entry["answer"] == recomputed(entry["family"], entry["question"])
    lengths = {len(prompts.split_tokens(answers[line["custom_id"]]["answer"])) for line in found}
    assert min(lengths) <= 2 and max(lengths) >= 300
