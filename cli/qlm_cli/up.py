"""`qlm up`: the whole service on this machine until Ctrl-C."""

from __future__ import annotations

import signal
import socket
import threading
import time
from pathlib import Path
from types import FrameType

import click
import httpx

from qlm_batch.domain.errors import ConfigurationError
from qlm_batch.embedded.service import EmbeddedService
from qlm_batch.scheduling.policies import policy
from qlm_batch.settings import Settings, load_settings
from qlm_cli.context import data_dir_option, json_option
from qlm_cli.existing_engine import look_at
from qlm_cli.output import Output
from qlm_workers.adapters import adapters_of
from qlm_workers.naming import located

DEFAULT_MODEL = "qlm-tiny"


@click.command()
@click.option(
    "--model",
    "models",
    multiple=True,
    help="Hugging Face id or folder; embed:NAME for embeddings; repeatable.  [qlm-tiny]",
)
@click.option(
    "--models-awake",
    type=click.IntRange(min=1),
    default=None,
    help="Most models awake at once; the others wait their turn.  [all that fit]",
)
@click.option(
    "--lora",
    multiple=True,
    metavar="[BASE:]NAME=FOLDER",
    help="A LoRA adapter of a model, the first one without BASE; repeatable.",
)
@click.option(
    "--tool-parser",
    metavar="NAME",
    help="How the models write tool calls, as hermes or llama3_json; for requests with tools.",
)
@data_dir_option
@click.option("--port", type=click.IntRange(1, 65535), help="The API's port.  [8600]")
@click.option("--host", default=None, help="The API's address.  [127.0.0.1]")
@click.option(
    "--engine",
    type=click.Choice(["vllm", "openai", "simulated"]),
    default=None,
    help="vLLM here, a server that already runs, or invented answers.  [vllm]",
)
@click.option("--engine-url", "--url", "engine_url", help="The server behind --engine openai.")
@json_option
def up(
    models: tuple[str, ...],
    models_awake: int | None,
    lora: tuple[str, ...],
    tool_parser: str | None,
    data_dir: Path,
    port: int | None,
    host: str | None,
    engine: str | None,
    engine_url: str | None,
    as_json: bool,
) -> None:
    """Start the whole service here, with its own PostgreSQL and Valkey, and keep it running.

    DATABASE_URL and REDIS_URL replace the embedded servers. Ctrl-C stops everything.
    """
    output = Output(as_json)
    settings = settings_for_up(
        data_dir=data_dir,
        models=models,
        models_awake=models_awake,
        lora=lora,
        tool_parser=tool_parser,
        port=port,
        host=host,
        engine=engine,
        engine_url=engine_url,
    )
    # Told now, not by the scheduler once everything has started.
    policy(settings.policy)
    if settings.engine == "openai":
        served, lines = look_at(settings.engine_url, settings.engine_api_key, settings.models)
        settings = settings.model_copy(update={"models": served})
        for line in lines:
            output.note(line)
    stop = stop_event()
    service = EmbeddedService(settings, lambda name, text: output.note(f"{name}: {text}"))
    service.start()
    try:
        began = time.monotonic()
        output.note(f"starting; logs in {service.folders.data / 'logs'}")
        if wait_until_ready(service, stop):
            output.event(
                {
                    "event": "ready",
                    "url": f"{service.url}/v1",
                    "key_file": str(service.key_file),
                    "seconds": round(time.monotonic() - began, 1),
                },
                f"ready after {time.monotonic() - began:.0f} s\n"
                f"  base_url  {service.url}/v1\n"
                f"  api_key   in {service.key_file}\n"
                f"  docs      {service.url}/docs\n"
                "Ctrl-C stops it.",
            )
            service.watch(stop)
    finally:
        output.note("stopping")
        service.stop()
        output.event({"event": "stopped"}, "stopped")


def settings_for_up(
    *,
    data_dir: Path,
    models: tuple[str, ...] = (),
    models_awake: int | None = None,
    lora: tuple[str, ...] = (),
    tool_parser: str | None = None,
    port: int | None = None,
    host: str | None = None,
    engine: str | None = None,
    engine_url: str | None = None,
    **more: object,
) -> Settings:
    """Settings from the environment with what was given on the command line on top."""
    given: dict[str, object] = {"data_dir": data_dir, **more}
    for name, value in (
        ("port", port),
        ("host", host),
        ("engine", engine),
        ("engine_url", engine_url),
        ("models", models or None),
        ("models_awake", models_awake),
        ("lora", lora or None),
        ("tool_parser", tool_parser),
    ):
        if value is not None:
            given[name] = value
    settings = load_settings(**given)
    if settings.engine == "openai" and not settings.engine_url:
        raise ConfigurationError("--engine openai needs --url, the address of a running server")
    if not settings.models and settings.engine != "openai":
        settings = settings.model_copy(update={"models": (DEFAULT_MODEL,)})
    if settings.engine == "vllm":
        for model in settings.models:
            located(model.removeprefix("embed:"))
    adapters_of(settings)
    _require_free_port(settings.host, settings.port)
    return settings


def stop_event() -> threading.Event:
    """Set on the first SIGINT or SIGTERM; a second one ends the process."""
    stop = threading.Event()

    def handle(number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(signal.Signals(number))
        stop.set()

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
    return stop


def wait_until_ready(service: EmbeddedService, stop: threading.Event) -> bool:
    """Wait until the API lists every model of the worker; False when stopped before.

    ConfigurationError when a process cannot work or the start takes longer than its limit.
    """
    deadline = time.monotonic() + service.settings.start_timeout_s
    wanted = max(1, len(service.settings.models))
    key = service.key_file.read_text().strip()
    with httpx.Client(
        base_url=service.url,
        headers={"Authorization": f"Bearer {key}"},
        timeout=5,
        trust_env=False,
    ) as client:
        while not stop.wait(0.1):
            service.check()
            try:
                answer = client.get("/v1/models")
                if answer.status_code == 200 and len(answer.json()["data"]) >= wanted:
                    return True
            except httpx.TransportError:
                pass
            if time.monotonic() > deadline:
                raise ConfigurationError(
                    f"not ready within {service.settings.start_timeout_s:.0f} s; see the logs in "
                    f"{service.folders.data / 'logs'}"
                )
    return False


def _require_free_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigurationError(
                f"cannot listen on {host}:{port} ({error.strerror}); choose another --port"
            ) from error
