"""The README's commands do what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from .conftest import CHECKOUT, RunningService

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

_BLOCK = re.compile(r"<!-- run(?:: (\w+))? -->\n```(\w+)\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A piece of the README that is marked to be run."""

    how: str
    language: str
    code: str


def _blocks() -> list[Block]:
    text = (CHECKOUT / "README.md").read_text()
    return [Block(how or "shell", language, code) for how, language, code in _BLOCK.findall(text)]


def _run(service: RunningService, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a program in the folder of the tour, as the service's user."""
    return subprocess.run(
        command,
        env=dict(service.environment),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run: a folder with the examples, as in a checkout."""
    path = tmp_path_factory.mktemp("tour")
    (path / "examples").symlink_to(CHECKOUT / "examples")
    return path


def test_the_readme_starts_the_service_as_these_tests_do() -> None:
    assert [block.code.strip() for block in _blocks() if block.how == "service"] == ["qlm up"]


@pytest.mark.parametrize(
    "code", [block.code for block in _blocks() if block.how == "shell"], ids=lambda c: c[:24]
)
def test_each_shell_block_runs(code: str, service: RunningService, folder: Path) -> None:
    outcome = _run(service, folder, "bash", "-euo", "pipefail", "-c", code)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def test_the_python_example_completes(service: RunningService, folder: Path) -> None:
    (code,) = (block.code for block in _blocks() if block.how == "python")
    outcome = _run(service, folder, sys.executable, "-c", code.replace("8600", str(service.port)))
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.startswith("completed ")


def test_the_chat_example_answers_while_its_batch_runs(
    service: RunningService, folder: Path
) -> None:
    (code,) = (block.code for block in _blocks() if block.how == "chat")
    outcome = _run(service, folder, sys.executable, "-c", code.replace("8600", str(service.port)))
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.strip()


def test_every_command_of_the_table_exists(service: RunningService) -> None:
    text = (CHECKOUT / "README.md").read_text()
    named = set(re.findall(r"`qlm ([a-z]+)", text))
    helped = service.qlm("--help").stdout
    listed = set(re.findall(r"^  ([a-z]+) ", helped, re.MULTILINE))
    assert named and named <= listed
