"""Commands on API keys; they speak to the database, so they work before any key exists."""

from __future__ import annotations

import json
from pathlib import Path

import click

from qlm_batch.api.limits import LIMITS
from qlm_batch.bootstrap import open_store
from qlm_batch.domain.errors import ConfigurationError
from qlm_batch.domain.jobs import ApiKey
from qlm_batch.ids import KEY, new_id, new_secret
from qlm_batch.settings import load_settings
from qlm_batch.store.postgres import PostgresStore
from qlm_cli.client import private_text
from qlm_cli.context import data_dir_option, json_option
from qlm_cli.output import Output, clock


@click.group()
def keys() -> None:
    """Make, list and revoke API keys."""


@keys.command("create")
@click.option("--tenant", default="local", show_default=True, help="Whose key this is.")
@click.option("--name", default="", help="What it is for.")
@click.option(
    "--role",
    type=click.Choice(["admin", "user", "read"]),
    default="user",
    show_default=True,
    help="read looks; user submits and asks too; admin also sees the fleet and makes the webhook "
    "secret.",
)
@click.option(
    "--limit",
    "limits",
    multiple=True,
    metavar="NAME=NUMBER",
    help=f"{', '.join(f'{name}=…' for name in LIMITS[:-1])} or {LIMITS[-1]}=…; repeatable.",
)
@data_dir_option
@json_option
def create(
    tenant: str, name: str, role: str, limits: tuple[str, ...], data_dir: Path, as_json: bool
) -> None:
    """Make a key and print it; it cannot be shown again."""
    secret = new_secret()
    store = _store(data_dir)
    key = ApiKey(
        id=new_id(KEY),
        tenant=tenant,
        name=name,
        role=role,
        prefix=secret[:12],
        created_at=store.now(),
        limits=dict(_limit(text) for text in limits),
    )
    store.add_key(key, secret)
    Output(as_json).result({**_shown(key), "key": secret}, secret)


@keys.command("list")
@click.option("--tenant", help="Only this tenant's.")
@data_dir_option
@json_option
def list_keys(tenant: str | None, data_dir: Path, as_json: bool) -> None:
    """List keys, revoked ones included."""
    rows = [_shown(key) for key in _store(data_dir).list_keys(tenant)]
    columns = ("id", "tenant", "name", "role", "prefix", "created", "revoked")
    Output(as_json).table(rows, columns, rows)


@keys.command("revoke")
@click.argument("key_id")
@data_dir_option
@json_option
def revoke(key_id: str, data_dir: Path, as_json: bool) -> None:
    """End a key at once."""
    key = _store(data_dir).revoke_key(key_id)
    Output(as_json).result(_shown(key), f"{key.id} is revoked")


def _store(data_dir: Path) -> PostgresStore:
    """The store of DATABASE_URL, or of the service running in `data_dir`."""
    settings = load_settings(data_dir=data_dir)
    if not settings.database_url:
        state = private_text(data_dir / "service.json")
        if state is None:
            raise ConfigurationError(
                f"no database: set DATABASE_URL, or start a service with `qlm up` ({data_dir})"
            )
        found = json.loads(state)
        settings = settings.model_copy(
            update={
                "database_url": found["database_url"],
                "secret_key": (data_dir / "secret.key").read_text().strip(),
            }
        )
    return open_store(settings)


def _limit(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if name not in LIMITS or not number.isdecimal():
        allowed = " or ".join(f"{known}=NUMBER" for known in LIMITS)
        raise click.BadParameter(f"{text!r} is not {allowed}", param_hint="--limit")
    return name, int(number)


def _shown(key: ApiKey) -> dict[str, object]:
    return {
        "id": key.id,
        "tenant": key.tenant,
        "name": key.name,
        "role": key.role,
        "prefix": key.prefix + "…",
        "created": clock(key.created_at),
        "revoked": clock(key.revoked_at),
        "limits": dict(key.limits),
    }
