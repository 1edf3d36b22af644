"""What a model is called, where it lies, and what its folder tells."""

from __future__ import annotations

import re
from pathlib import Path

import orjson

from qlm_batch.domain.errors import ConfigurationError
from qlm_batch.domain.jobs import EngineKind
from qlm_batch.models import resolve_model
from qlm_batch.settings import Settings

_EMBED = "embed:"


def parse_model(spec: str) -> tuple[str, EngineKind]:
    """Model and kind of an entry of `Settings.models`: `embed:NAME` embeds, `NAME` generates."""
    if spec.startswith(_EMBED):
        return spec.removeprefix(_EMBED), EngineKind.EMBED
    return spec, EngineKind.GENERATE


def names_a_folder(model: str) -> bool:
    """Whether `model` is meant as a path, not as the id of a shipped or a Hugging Face model."""
    return resolve_model(model) == model and (
        model.startswith(("/", "./", "../", "~")) or Path(model).is_dir()
    )


def served_name(model: str) -> str:
    """The name requests use: the name given, or for a folder the folder's own."""
    if not names_a_folder(model):
        return model
    return Path(model).expanduser().resolve().name


def told_length(settings: Settings, model: str) -> int:
    """The context length the settings or the model's folder tell; 0 where neither does."""
    if settings.max_model_len:
        return settings.max_model_len
    try:
        config = orjson.loads(
            (Path(resolve_model(model)).expanduser() / "config.json").read_bytes()
        )
    except (OSError, orjson.JSONDecodeError):
        return 0
    told = config.get("max_position_embeddings") if isinstance(config, dict) else None
    return told if isinstance(told, int) else 0


def located(model: str) -> str:
    """The absolute path of a folder or a shipped model; any other name as it is.

    ConfigurationError when a path is named and nothing is there: it is never looked for elsewhere.
    """
    if not names_a_folder(model):
        return resolve_model(model)
    folder = Path(model).expanduser().resolve()
    if not folder.is_dir():
        raise ConfigurationError(
            f"there is no model folder {folder}; give the path of a folder with config.json, or a "
            "Hugging Face id without a leading ./",
            param="models",
        )
    return str(folder)


def shown(url: str) -> str:
    """An address as it may be shown: without a name and password in it."""
    return re.sub(r"^([^/?#]*//)[^/?#]*@", r"\1", url)
