"""Messages as JSON objects. One that does not fit is refused with the field at fault."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, fields
from typing import Any

from qlm_batch.domain.errors import InvalidInput
from qlm_batch.domain.messages import Assigned, Interactive, Stopped

VERSION = 2
MAX_FIELD = 256
"""Longest text of a field, in characters; a body is as long as the API lets in."""

Message = Assigned | Stopped | Interactive
_TYPES: Mapping[str, type[Message]] = {
    "assigned": Assigned,
    "stopped": Stopped,
    "interactive": Interactive,
}
_NAMES = {kind: name for name, kind in _TYPES.items()}


def encode(message: Message) -> dict[str, str | int | float]:
    """The message as a JSON object."""
    told = {part.name: getattr(message, part.name) for part in fields(message)}
    return {"v": VERSION, "type": _NAMES[type(message)], **told}


def decode(data: object) -> Message:
    """The message in a JSON object. InvalidInput when it is none of ours or of another version."""
    if not isinstance(data, Mapping):
        raise InvalidInput(f"a message must be an object, not {type(data).__name__}")
    if data.get("v") != VERSION:
        raise InvalidInput(
            f"message version {data.get('v')!r} is not {VERSION}; run one release everywhere",
            param="v",
        )
    kind = data.get("type")
    wanted = _TYPES.get(kind) if isinstance(kind, str) else None
    if wanted is None:
        raise InvalidInput(f"unknown message type {kind!r}", param="type")
    parts = fields(wanted)
    extra = set(data) - {"v", "type", *(part.name for part in parts)}
    if extra:
        raise InvalidInput(f"unknown field in a message: {min(map(str, extra))}")
    return wanted(**{part.name: _value(part, data.get(part.name)) for part in parts})


def _value(part: Field[Any], value: object) -> Any:
    name = part.name
    # Annotations are texts: every module postpones their evaluation.
    match part.type:
        case "str":
            # Refused here, a body that was let in would be sent again and again.
            if isinstance(value, str) and value and (name == "body" or len(value) <= MAX_FIELD):
                return value
            raise InvalidInput(f"{name} must be a text of 1 to {MAX_FIELD} characters", param=name)
        case "bool":
            if isinstance(value, bool):
                return value
            raise InvalidInput(f"{name} must be true or false", param=name)
        case "int":
            if isinstance(value, int) and not isinstance(value, bool):
                return value
            raise InvalidInput(f"{name} must be a whole number", param=name)
        case _:
            if isinstance(value, int | float) and not isinstance(value, bool):
                return float(value)
            raise InvalidInput(f"{name} must be a number", param=name)
