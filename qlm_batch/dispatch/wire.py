"""Hints as JSON objects. A message that does not fit is refused with the field at fault."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields

from qlm_batch.domain.errors import InvalidInput
from qlm_batch.domain.messages import Assigned, Stopped

VERSION = 1
MAX_FIELD = 256
"""Longest text of a field, in characters."""

Message = Assigned | Stopped
_TYPES: Mapping[str, type[Assigned] | type[Stopped]] = {"assigned": Assigned, "stopped": Stopped}
_NAMES = {kind: name for name, kind in _TYPES.items()}


def encode(message: Message) -> dict[str, str | int]:
    """The message as a JSON object."""
    return {"v": VERSION, "type": _NAMES[type(message)], **asdict(message)}


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
    names = [field.name for field in fields(wanted)]
    extra = set(data) - {"v", "type", *names}
    if extra:
        raise InvalidInput(f"unknown field in a message: {min(map(str, extra))}")
    return wanted(**{name: _text(data, name) for name in names})


def _text(data: Mapping[object, object], name: str) -> str:
    value = data.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= MAX_FIELD:
        raise InvalidInput(f"{name} must be a text of 1 to {MAX_FIELD} characters", param=name)
    return value
