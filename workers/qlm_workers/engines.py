"""Which engine serves a model: chosen by the settings, imported only when chosen."""

from __future__ import annotations

from collections.abc import Sequence

from qlm_batch.domain.engine import Engine
from qlm_batch.domain.jobs import EngineKind
from qlm_batch.settings import Settings
from qlm_workers.adapters import Adapter
from qlm_workers.naming import located, served_name


def make_engine(
    settings: Settings, model: str, kind: EngineKind, adapters: Sequence[Adapter] = ()
) -> Engine:
    """An engine for `model` (an id, a folder or a shipped model's name), not started yet.

    `adapters` are those of this model.
    """
    name = served_name(model)
    if settings.engine == "openai":
        from qlm_workers.openai_engine import OpenAIEngine

        return OpenAIEngine.from_settings(settings, name, kind)
    if settings.engine == "simulated":
        from qlm_workers.simulated_engine import SimulatedEngine

        return SimulatedEngine.from_settings(settings, name, kind, adapters)
    from qlm_workers.vllm_engine import VllmEngine

    return VllmEngine(settings, name, located(model), kind, adapters)
