"""The command line: one group, and the one place where its errors are shown."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from importlib import import_module, metadata

import click

from qlm_batch.domain.errors import ConfigurationError, QlmError, Unavailable
from qlm_cli.context import EXIT_FAILED, EXIT_UNREACHABLE

EXIT_CONFIGURATION = 78

COMMANDS: Mapping[str, str] = {
    "up": "qlm_cli.up:up",
    "demo": "qlm_cli.demo:demo",
    "submit": "qlm_cli.batches:submit",
    "status": "qlm_cli.batches:status",
    "results": "qlm_cli.batches:results",
    "cancel": "qlm_cli.batches:cancel",
    "retry": "qlm_cli.batches:retry",
    "replay": "qlm_cli.batches:replay",
    "list": "qlm_cli.batches:list_batches",
    "estimate": "qlm_cli.foresight:estimate",
    "explain": "qlm_cli.explain:explain",
    "calibration": "qlm_cli.foresight:calibration",
    "top": "qlm_cli.top:top",
    "simulate": "qlm_cli.simulate:simulate",
    "keys": "qlm_cli.keys:keys",
    "db": "qlm_cli.processes:db",
    "api": "qlm_cli.processes:api",
    "scheduler": "qlm_cli.processes:scheduler",
    "files": "qlm_cli.processes:files",
    "callbacks": "qlm_cli.processes:callbacks",
    "worker": "qlm_cli.processes:worker",
    "completion": "qlm_cli.completion:completion",
}
"""Where each command is, in the order of the help: what most need first."""


class _Commands(click.Group):
    """Imports a command when it is used, so that a client command starts without the service."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(import_module(module), name)
        return command


_EXITS = (
    "Exit status: 0 fine, 1 refused or failed, 2 wrong usage, 3 a batch waited for did not complete"
    " or an estimated file would not be in time, 4 the service cannot be reached, 78 it cannot work"
    " as configured."
)


@click.group(
    cls=_Commands,
    epilog=_EXITS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(metadata.version("qlm-batch"), prog_name="qlm")
def cli() -> None:
    """Run LLM batch files with deadlines beside interactive traffic, on your own GPUs.

    Start with `qlm up`, then `qlm submit FILE --wait`.
    """


def main() -> None:
    """Run the command line; errors become one message and an exit status."""
    try:
        cli.main(prog_name="qlm", standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except QlmError as error:
        if "--json" in sys.argv:
            click.echo(json.dumps({"error": error.body()}))
        click.echo(f"qlm: {error.in_full}", err=True)
        sys.exit(_status_of(error))


def _status_of(error: QlmError) -> int:
    if isinstance(error, ConfigurationError):
        return EXIT_CONFIGURATION
    return EXIT_UNREACHABLE if isinstance(error, Unavailable) else EXIT_FAILED
