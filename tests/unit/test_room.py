"""How many models a worker keeps awake."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from qlm_batch.settings import Settings
from qlm_workers.room import CPU_KV_BYTES, PROCESS_BYTES, models_that_fit

GIB = 1024**3


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, ...]:
    """Two models with a megabyte of weights each."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(1024**2))
    return tuple(str(tmp_path / name) for name in ("a", "b"))


def test_the_setting_is_obeyed_and_never_exceeds_what_is_hosted() -> None:
    assert models_that_fit(Settings(models=("a", "b"), models_awake=1), on_gpu=False) == 1
    assert models_that_fit(Settings(models=("a",), models_awake=3), on_gpu=True) == 1


@pytest.mark.parametrize(("share", "fits"), [(None, 1), (0.5, 2), (0.45, 2), (0.3, 3), (0.1, 4)])
def test_on_a_gpu_as_many_fit_as_their_shares_leave_room_for(
    share: float | None, fits: int
) -> None:
    arguments = {} if share is None else {"gpu_memory_utilization": share}
    settings = Settings(models=("a", "b", "c", "d"), engine_args=arguments)
    assert models_that_fit(settings, on_gpu=True) == fits


@pytest.mark.parametrize(("free_gib", "fits"), [(100.0, 2), (3.0, 1), (0.1, 1)])
def test_on_a_processor_as_many_fit_as_memory_holds(
    folders: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, free_gib: float, fits: int
) -> None:
    assert CPU_KV_BYTES + PROCESS_BYTES < 3.0 * GIB < 2 * (CPU_KV_BYTES + PROCESS_BYTES)
    memory = SimpleNamespace(available=int(free_gib * GIB))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert models_that_fit(Settings(models=folders), on_gpu=False) == fits


def test_models_of_a_server_are_its_own_affair() -> None:
    assert models_that_fit(Settings(models=("a", "b"), engine="openai"), on_gpu=True) == 2
