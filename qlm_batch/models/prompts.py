"""Prompts whose right answer, and its length in tokens, is known beforehand.

Everything is a function of its seed. A hash of each problem puts it in the training part or the
held-out part, so the two never share a prompt; capitals are split by phrasing instead.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from qlm_batch.models import TINY_MODEL_NAME
from qlm_batch.models.vocabulary import CAPITALS, NAMES, TOWNS, WORDS

MAX_OUTPUT_TOKENS: Final = 400
LONG_FAMILIES: Final = ("count", "table")
# Trained on so that the end of a table is learnt, and not promised: about four in five are right.
TRAINING_FAMILIES: Final = ("rows",)

_HELD_OUT_ONE_IN: Final = 5
_MAX_DRAWS: Final = 20_000


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question, its only right answer, and the tokens that answer takes, end token included."""

    family: str
    text: str
    answer: str
    output_tokens: int


@dataclass(frozen=True, slots=True)
class _Problem:
    key: str
    text: str
    answer: str


_PHRASINGS: Final[dict[str, tuple[str, ...]]] = {
    "add": (
        "What is {a} + {b}?",
        "{a} + {b} =",
        "Add {a} and {b}.",
        "What is {a} plus {b}?",
    ),
    "subtract": (
        "What is {a} - {b}?",
        "{a} - {b} =",
        "Subtract {b} from {a}.",
        "What is {a} minus {b}?",
    ),
    "sort": (
        "Sort these words: {words}",
        "Put these words in alphabetical order: {words}",
        "Sort alphabetically: {words}",
    ),
    "reverse": (
        'Reverse the word "{word}".',
        'Spell "{word}" backwards.',
        "Reverse: {word}",
        "Write the letters of {word} in reverse order.",
    ),
    "letters": (
        'How many times does the letter "{letter}" appear in "{word}"?',
        'Count the letter "{letter}" in "{word}".',
        "How many {letter} are in {word}?",
    ),
    "count": (
        "Count from {first} to {last}.",
        "Write the numbers from {first} to {last}.",
        "List every number from {first} to {last}.",
    ),
    "table": (
        "Write the {factor} times table up to {rows}.",
        "Show the multiplication table of {factor} up to {rows}.",
        "Multiply {factor} by every number from 1 to {rows}.",
        "List the {factor} times table from 1 to {rows}.",
    ),
    "rows": (
        "Multiply {factor} by every number from {first} to {last}.",
        "List the {factor} times table from {first} to {last}.",
    ),
}

_CAPITAL_PHRASINGS: Final = (
    "What is the capital of {country}?",
    "Name the capital of {country}.",
    "The capital of {country} is",
    "Capital of {country}?",
    "Which city is the capital of {country}?",
    "Tell me the capital of {country}.",
    "What city is the capital of {country}?",
    "What is the name of the capital city of {country}?",
    "{country}: which city is the capital?",
    "What is the capital city of {country}?",
    "Please name the capital of {country}.",
    "Give the capital of {country}.",
    "For {country}, name the capital.",
    "I want to know the capital of {country}.",
    "Can you tell me which city is the capital of {country}?",
    "Write the name of the capital of {country}.",
    "{country} has which capital?",
    "What capital does {country} have?",
)
_HELD_OUT_CAPITAL_PHRASINGS: Final = (
    "Name the capital city of {country}.",
    "Please tell me the capital of {country}.",
    "Which city is the capital city of {country}?",
    "Can you name the capital of {country}?",
    "For {country}, what is the capital?",
    "What is the name of the capital of {country}?",
    "Give me the name of the capital of {country}.",
    "{country}: what is the capital?",
)

_RECORDS: Final = (
    "name: {name}, town: {town}, item: {item}, quantity: {quantity}",
    "item: {item}, quantity: {quantity}, name: {name}, town: {town}",
    "{name} from {town} ordered {quantity} of item {item}.",
    "Send {quantity} of item {item} to {name} in {town}.",
)
_EXTRACT_PHRASINGS: Final = (
    "Extract the {field} as JSON: {record}",
    "Give the {field} as JSON: {record}",
    "Which {field}? Answer in JSON. {record}",
)
_FIELDS: Final = ("name", "town", "item", "quantity")

_CONSONANTS: Final = "bcdfghjklmnprstvwz"
_VOWELS: Final = "aeiou"


def _invented_word(rng: random.Random) -> str:
    length = rng.randint(3, 10)
    vowel_next = rng.random() < 0.4
    letters: list[str] = []
    while len(letters) < length:
        letters.append(rng.choice(_VOWELS if vowel_next else _CONSONANTS))
        vowel_next = not vowel_next if rng.random() < 0.85 else vowel_next
    return "".join(letters)


def _any_word(rng: random.Random) -> str:
    return rng.choice(WORDS) if rng.random() < 0.5 else _invented_word(rng)


def _add(rng: random.Random, held_out: bool) -> _Problem:
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    phrasing = rng.choice(_PHRASINGS["add"])
    return _Problem(f"{a}+{b}", phrasing.format(a=a, b=b), str(a + b))


def _subtract(rng: random.Random, held_out: bool) -> _Problem:
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    phrasing = rng.choice(_PHRASINGS["subtract"])
    return _Problem(f"{a}-{b}", phrasing.format(a=a, b=b), str(a - b))


def _sort(rng: random.Random, held_out: bool) -> _Problem:
    count = rng.randint(3, 6)
    words: list[str] = []
    while len(words) < count:
        word = rng.choice(WORDS)
        if all(word[:2] != other[:2] for other in words):
            words.append(word)
    ordered = sorted(words)
    text = rng.choice(_PHRASINGS["sort"]).format(words=", ".join(words))
    return _Problem(" ".join(ordered), text, ", ".join(ordered))


def _reverse(rng: random.Random, held_out: bool) -> _Problem:
    word = _any_word(rng)
    return _Problem(word, rng.choice(_PHRASINGS["reverse"]).format(word=word), word[::-1])


def _letters(rng: random.Random, held_out: bool) -> _Problem:
    word = _any_word(rng)
    letter = rng.choice(word if rng.random() < 0.75 else _CONSONANTS + _VOWELS)
    text = rng.choice(_PHRASINGS["letters"]).format(letter=letter, word=word)
    return _Problem(f"{letter} in {word}", text, str(word.count(letter)))


def _capital(rng: random.Random, held_out: bool) -> _Problem:
    country = rng.choice(tuple(CAPITALS))
    phrasing = rng.choice(_HELD_OUT_CAPITAL_PHRASINGS if held_out else _CAPITAL_PHRASINGS)
    return _Problem(phrasing, phrasing.format(country=country), CAPITALS[country])


def _extract(rng: random.Random, held_out: bool) -> _Problem:
    field = rng.choice(_FIELDS)
    values = {
        "name": rng.choice(NAMES),
        "town": rng.choice(TOWNS),
        "item": rng.choice(WORDS),
        "quantity": str(rng.randint(2, 99)),
    }
    record = rng.choice(_RECORDS).format(**values)
    value = values[field] if field == "quantity" else f'"{values[field]}"'
    text = rng.choice(_EXTRACT_PHRASINGS).format(field=field, record=record)
    return _Problem(" ".join(values.values()), text, f'{{"{field}": {value}}}')


def _count(rng: random.Random, held_out: bool) -> _Problem:
    length = round(math.exp(rng.uniform(math.log(4), math.log(130))))
    first = rng.randint(0, 150 - length)
    last = first + length - 1
    text = rng.choice(_PHRASINGS["count"]).format(first=first, last=last)
    return _Problem(f"{first}..{last}", text, ", ".join(map(str, range(first, last + 1))))


def _table(rng: random.Random, held_out: bool) -> _Problem:
    factor = rng.randint(2, 15)
    rows = rng.randint(3, 40)
    text = rng.choice(_PHRASINGS["table"]).format(factor=factor, rows=rows)
    lines = (f"{factor} x {row} = {factor * row}" for row in range(1, rows + 1))
    return _Problem(f"{factor}x{rows}", text, "\n".join(lines))


def _rows(rng: random.Random, held_out: bool) -> _Problem:
    factor = rng.randint(2, 15)
    first = rng.randint(2, 38)
    last = rng.randint(first + 2, 40)
    text = rng.choice(_PHRASINGS["rows"]).format(factor=factor, first=first, last=last)
    lines = (f"{factor} x {row} = {factor * row}" for row in range(first, last + 1))
    return _Problem(f"{factor}x{first}..{last}", text, "\n".join(lines))


_DRAW: Final[dict[str, Callable[[random.Random, bool], _Problem]]] = {
    "add": _add,
    "subtract": _subtract,
    "sort": _sort,
    "reverse": _reverse,
    "capital": _capital,
    "letters": _letters,
    "extract": _extract,
    "count": _count,
    "table": _table,
    "rows": _rows,
}
FAMILIES: Final = tuple(family for family in _DRAW if family not in TRAINING_FAMILIES)


def _all_phrasings() -> Iterator[str]:
    for phrasings in _PHRASINGS.values():
        yield from phrasings
    yield from _CAPITAL_PHRASINGS
    yield from _RECORDS
    for phrasing in _EXTRACT_PHRASINGS:
        for field in _FIELDS:
            yield phrasing.replace("{field}", field)


def template_tokens() -> tuple[str, ...]:
    """The whole-word tokens: each word of a question's frame, with the space before it."""
    inner: set[str] = set()
    opening: set[str] = set()
    for phrasing in _all_phrasings():
        frame = re.sub(r"\{\w+\}", "0", phrasing)
        inner.update(re.findall(r" [A-Za-z]{2,}", frame))
        opening.update(re.findall(r"^[A-Z][a-z]+", frame))
    return tuple(sorted(inner) + sorted(opening))


QUESTION_MARK: Final = "Q: "
ANSWER_MARK: Final = "\nA:"
_JOINTS: Final = (QUESTION_MARK, ANSWER_MARK, ", ", ": ", " = ", " x ", " + ", " - ")
TOKEN_PATTERN: Final = "|".join(
    [*map(re.escape, _JOINTS)]
    + [f"{re.escape(word)}(?![A-Za-z])" for word in sorted(template_tokens(), reverse=True)]
    + [r"[\s\S]"]
)
_TOKEN: Final = re.compile(TOKEN_PATTERN)


def joint_tokens() -> tuple[str, ...]:
    """The tokens that mark the turn, or join the parts of a question or an answer."""
    return _JOINTS


def split_tokens(text: str) -> list[str]:
    """`text` cut as the shipped tokenizer cuts it: frame words whole, all else by the character."""
    return _TOKEN.findall(text)


def is_held_out(family: str, key: str) -> bool:
    """Whether the problem named by `key` is kept out of training."""
    if family == "capital":
        return key in _HELD_OUT_CAPITAL_PHRASINGS
    digest = hashlib.sha256(f"{family}|{key}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % _HELD_OUT_ONE_IN == 0


def draw(family: str, rng: random.Random, *, held_out: bool) -> Prompt:
    """One prompt of `family` from the held-out part, or else from the training part."""
    while True:
        problem = _DRAW[family](rng, held_out)
        output_tokens = len(split_tokens(problem.answer)) + 1
        if output_tokens > MAX_OUTPUT_TOKENS or is_held_out(family, problem.key) != held_out:
            continue
        return Prompt(family, problem.text, problem.answer, output_tokens)


def _seeded(seed: str) -> random.Random:
    return random.Random(seed)  # noqa: S311  (repeatable prompts, no secrets)


def held_out(family: str, n: int, seed: int) -> list[Prompt]:
    """`n` different held-out prompts of `family`; ValueError if it has not that many."""
    rng = _seeded(f"{family}/{seed}")
    found: dict[str, Prompt] = {}
    for _ in range(_MAX_DRAWS + 20 * n):
        if len(found) >= n:
            break
        prompt = draw(family, rng, held_out=True)
        found.setdefault(prompt.text, prompt)
    if len(found) < n:
        raise ValueError(f"{family} has {len(found)} held-out prompts, not {n}")
    return list(found.values())


def mixed(n: int, seed: int) -> list[Prompt]:
    """`n` held-out prompts of all families in random order; a prompt may come twice."""
    rng = _seeded(f"mixed/{seed}")
    rounds = [FAMILIES[i % len(FAMILIES)] for i in range(n)]
    rng.shuffle(rounds)
    return [draw(family, rng, held_out=True) for family in rounds]


def long_output(n: int, seed: int, min_tokens: int, max_tokens: int) -> list[Prompt]:
    """`n` held-out prompts whose answers take `min_tokens` to `max_tokens` tokens; may repeat.

    Raises ValueError where no answer of such a length can be found.
    """
    rng = _seeded(f"long/{seed}/{min_tokens}/{max_tokens}")
    found: list[Prompt] = []
    misses = 0
    while len(found) < n:
        prompt = draw(rng.choice(LONG_FAMILIES), rng, held_out=True)
        if min_tokens <= prompt.output_tokens <= max_tokens:
            found.append(prompt)
            misses = 0
        elif (misses := misses + 1) > _MAX_DRAWS:
            raise ValueError(f"no held-out answer takes {min_tokens} to {max_tokens} tokens")
    return found


def is_right(prompt: Prompt, answer_text: str) -> bool:
    """Whether `answer_text` is the prompt's answer; space around it does not count."""
    return answer_text.strip() == prompt.answer


def completion_text(text: str) -> str:
    """The question as `/v1/completions` takes it, which is what the chat template renders to."""
    return f"{QUESTION_MARK}{text}{ANSWER_MARK}"


def chat_body(
    prompt: Prompt, *, model: str = TINY_MODEL_NAME, max_tokens: int = 512
) -> dict[str, Any]:
    """The body of a greedy `/v1/chat/completions` request that asks the prompt."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt.text}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }


def completion_body(
    prompt: Prompt, *, model: str = TINY_MODEL_NAME, max_tokens: int = 512
) -> dict[str, Any]:
    """The body of a greedy `/v1/completions` request that asks the prompt."""
    return {
        "model": model,
        "prompt": completion_text(prompt.text),
        "max_tokens": max_tokens,
        "temperature": 0,
    }
