"""The command line: one group, and the one place where its errors are shown."""

from __future__ import annotations

import json
import sys
from importlib import metadata

import click
from click.shell_completion import get_completion_class

from qlm_batch.domain.errors import ConfigurationError, QlmError, Unavailable
from qlm_cli import batches, demo, keys, processes, up
from qlm_cli.context import EXIT_FAILED, EXIT_UNREACHABLE

EXIT_CONFIGURATION = 78


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(metadata.version("qlm-batch"), prog_name="qlm")
def cli() -> None:
    """Run LLM batch files with deadlines beside interactive traffic, on your own GPUs.

    Start with `qlm up`, then `qlm submit FILE --wait`.
    """


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for SHELL; `eval "$(qlm completion bash)"` turns it on."""
    kind = get_completion_class(shell)
    if kind is None:
        raise click.BadParameter(f"no completion for {shell}")
    click.echo(kind(cli, {}, "qlm", "_QLM_COMPLETE").source())


for command in (
    batches.submit,
    batches.status,
    batches.results,
    batches.cancel,
    batches.retry,
    batches.list_batches,
    keys.keys,
    up.up,
    demo.demo,
    processes.db,
    processes.api,
    processes.scheduler,
    processes.files,
    processes.callbacks,
    processes.worker,
):
    cli.add_command(command)


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
        click.echo(f"qlm: {error.message}", err=True)
        sys.exit(_status_of(error))


def _status_of(error: QlmError) -> int:
    if isinstance(error, ConfigurationError):
        return EXIT_CONFIGURATION
    return EXIT_UNREACHABLE if isinstance(error, Unavailable) else EXIT_FAILED
