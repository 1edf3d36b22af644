"""What is shipped is what was meant to be."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel as users get it."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, CHECKOUT],
        check=True,
        capture_output=True,
    )
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_installs_three_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    packages = {top for top in tops if not top.endswith(".dist-info")}
    assert packages == {"qlm_batch", "qlm_workers", "qlm_cli"}


def test_the_wheel_carries_migrations_examples_templates_and_the_model(
    wheel: zipfile.ZipFile,
) -> None:
    names = wheel.namelist()
    for wanted in (
        "qlm_batch/_migrations/env.py",
        "qlm_batch/_examples/chat.jsonl",
        "qlm_batch/models/qlm-tiny/model.safetensors",
        "qlm_batch/py.typed",
    ):
        assert wanted in names
    assert any(name.startswith("qlm_batch/callbacks/templates/") for name in names)


def test_the_shipped_model_stays_small(wheel: zipfile.ZipFile) -> None:
    weights = [info for info in wheel.infolist() if info.filename.endswith(".safetensors")]
    assert sum(info.file_size for info in weights) <= 8_000_000


def test_importing_the_command_line_loads_no_engine() -> None:
    code = "import sys, qlm_cli.main; print({'torch', 'vllm'} & set(sys.modules))"
    outcome = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert outcome.stdout.strip() == "set()"
