"""What FastAPI and pydantic find wrong with a request, in words for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qlm_batch.domain.errors import InvalidInput

_SHOWN = 100
_KEY_SHOWN = 20
_PREFIXES = ("Value error, ", "Assertion failed, ")
_OF_A_KEY = "[key]"
"""How pydantic ends the place of a fault in the key of a mapping, and not in its value."""

_WORDS: Mapping[str, str] = {
    "string_type": "must be a text",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number that is not so large",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "literal_error": "must be {expected}",
    "enum": "must be {expected}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "string_too_short": "must have at least {min_length} {things}",
    "string_too_long": "must have at most {max_length} {things}",
    "too_short": "must have at least {min_length} {things}",
    "too_long": "must have at most {max_length} {things}",
}
"""By pydantic's type of the fault; what is not here is told in pydantic's own words."""


def validation_error(problems: Sequence[Mapping[str, Any]]) -> InvalidInput:
    """The first of FastAPI's findings about a request, naming the field and what it should be."""
    problem = problems[0]
    where, kind = problem["loc"], str(problem["type"])
    if kind == "json_invalid":
        return InvalidInput(
            f"The request body is not valid JSON: {problem['ctx']['error']} "
            f"at character {where[-1]}.",
            code="invalid_json",
        )
    path = where[1:]
    of_a_key = len(path) > 2 and path[-1] == _OF_A_KEY
    param = ".".join(str(part) for part in (path[:-2] if of_a_key else path))[:_SHOWN] or None
    if param is None:
        return InvalidInput(
            "This request needs a JSON object as its body, with the header "
            "'content-type: application/json'.",
            code="invalid_body",
        )
    if kind == "missing":
        return InvalidInput(
            f"Missing required parameter: '{param}'.",
            code="missing_required_parameter",
            param=param,
        )
    if kind == "extra_forbidden":
        return InvalidInput(f"Unknown parameter: '{param}'.", code="unknown_parameter", param=param)
    whose = f"key {_abridged(str(path[-2]))} " if of_a_key else ""
    return InvalidInput(
        f"Invalid value for '{param}': {whose}{_words(problem)}.", code="invalid_value", param=param
    )


def _words(problem: Mapping[str, Any]) -> str:
    words = _WORDS.get(str(problem["type"]))
    if words is not None:
        return words.format(**{**problem.get("ctx", {}), "things": _things(problem.get("input"))})
    message = str(problem["msg"])
    for prefix in _PREFIXES:
        message = message.removeprefix(prefix)
    return message[:1].lower() + message[1:]


def _things(value: object) -> str:
    if isinstance(value, str):
        return "characters"
    return "pairs" if isinstance(value, Mapping) else "items"


def _abridged(key: str) -> str:
    return repr(key) if len(key) <= _KEY_SHOWN else repr(key[:_KEY_SHOWN]) + "…"
