"""What the README tells to type exists: every command, option and variable."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest

from qlm_batch.settings import Settings
from qlm_cli.main import cli

README = (Path(__file__).parents[2] / "README.md").read_text()
SHELL = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
COMMANDS = sorted(set(re.findall(r"(?<![\w/.-])qlm ([a-z][^\n)|<#]*)", SHELL)))
OF_THE_CLIENT = {"QLM_URL", "QLM_API_KEY"}


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_and_its_options_exist(line: str) -> None:
    words = shlex.split(line)
    command: Any = cli
    while words and isinstance(command, click.Group):
        name = words.pop(0)
        command = command.get_command(click.Context(command), name)
        assert command is not None, name
    known = {text for option in command.params for text in option.opts + option.secondary_opts}
    assert {word for word in words if re.match("-[-a-z]", word)} <= known


def test_commands_were_found() -> None:
    assert len(COMMANDS) > 15


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\bQLM_[A-Z_]+", README)) - OF_THE_CLIENT))
def test_a_variable_is_a_setting(name: str) -> None:
    assert name.removeprefix("QLM_").lower() in Settings.model_fields
