"""LoRA adapters: small additions to a base model, served by its engine under names of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from qlm_batch.domain.errors import ConfigurationError
from qlm_batch.domain.jobs import EngineKind
from qlm_batch.settings import Settings
from qlm_workers.naming import parse_model, served_name


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter's name, the folder it lies in, the name of its base model, and its rank."""

    name: str
    path: str
    base: str
    rank: int


def adapters_of(settings: Settings) -> tuple[Adapter, ...]:
    """The adapters the settings name, in their order.

    ConfigurationError for an entry that is not `NAME=FOLDER` or `BASE:NAME=FOLDER`, an unknown
    base, a name used twice, or a folder without a readable adapter_config.json.
    """
    parsed = [parse_model(model) for model in settings.models]
    bases = [served_name(model) for model, kind in parsed if kind is EngineKind.GENERATE]
    taken = {served_name(model) for model, _ in parsed}
    found = []
    for entry in settings.lora:
        adapter = _adapter(entry, bases)
        if adapter.name in taken:
            raise _refused(f"the name '{adapter.name}' is used twice")
        taken.add(adapter.name)
        found.append(adapter)
    if found and settings.engine == "openai":
        raise _refused(
            "a server loads its adapters itself: start it with them, and name them with --model"
        )
    return tuple(found)


def _adapter(entry: str, bases: Sequence[str]) -> Adapter:
    left, found, path = entry.partition("=")
    base, _, name = left.rpartition(":")
    if not found or not name or not path:
        raise _refused(f"'{entry}' is neither NAME=FOLDER nor BASE:NAME=FOLDER")
    if not bases:
        raise _refused(f"'{name}' has no base: no model here generates")
    if base and base not in bases:
        raise _refused(f"'{name}' names the base '{base}'; served here: {', '.join(bases)}")
    folder = Path(path).expanduser().resolve()
    return Adapter(name, str(folder), base or bases[0], _rank(folder, name))


def _rank(folder: Path, name: str) -> int:
    try:
        config = orjson.loads((folder / "adapter_config.json").read_bytes())
        return int(config["r"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _refused(
            f"the folder {folder} of '{name}' holds no readable adapter_config.json"
        ) from error


def _refused(why: str) -> ConfigurationError:
    return ConfigurationError(f"the adapters cannot be served: {why}; see --lora", param="lora")
