"""What every command shares: the options of the group, the client and the output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import update_wrapper
from pathlib import Path
from typing import Any, TypeVar

import click

from qlm_batch.settings import default_data_dir
from qlm_cli.client import Client, default_key
from qlm_cli.output import Output

EXIT_FAILED = 1
EXIT_UNFINISHED = 3
"""A batch waited for ended without completing, or work asked about would not be in time."""
EXIT_UNREACHABLE = 4

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(slots=True)
class Context:
    """How to reach the service and how to print."""

    url: str | None
    key: str | None
    data_dir: Path
    output: Output

    def client(self) -> Client:
        """A client for the service these options name."""
        return Client.find(self.url, self.key, self.data_dir)


def service_options(command: F) -> F:
    """Add `--url`, `--key`, `--data-dir` and `--json`, and pass a Context as first argument."""

    @click.option("--url", envvar="QLM_URL", help="The service's address.")
    @click.option("--key", help="API key; QLM_API_KEY otherwise, else the local user's own.")
    @data_dir_option
    @json_option
    def wrapper(
        url: str | None, key: str | None, data_dir: Path, as_json: bool, **kwargs: Any
    ) -> Any:
        return command(Context(url, key or default_key(), data_dir, Output(as_json)), **kwargs)

    return update_wrapper(wrapper, command)  # type: ignore[return-value]


data_dir_option = click.option(
    "--data-dir",
    envvar="QLM_DATA_DIR",
    type=click.Path(file_okay=False, path_type=Path),
    default=default_data_dir,
    show_default="~/.local/share/qlm-batch",
    help="Folder of a service started by `qlm up`.",
)
on_miss_option = click.option(
    "--on-miss",
    type=click.Choice(["expire", "finish_late"]),
    default="expire",
    show_default=True,
    help="What becomes of lines that are not done by the deadline.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
