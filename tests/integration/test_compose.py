"""`docker-compose.yml` and `Dockerfile`: valid, closed by default, true to the program."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import click
import pytest

from qlm_batch.api.server import GRACE_S
from qlm_batch.settings import Settings
from qlm_cli.main import cli
from tests.cluster_support import CHECKOUT, COMPOSE, compose_file

SECRETS = {
    "POSTGRES_PASSWORD": "one",
    "REDIS_PASSWORD": "two",
    "QLM_SECRET_KEY": "three",
    "QLM_MODELS": '["m"]',
}
DOCKERFILE = (CHECKOUT / "Dockerfile").read_text()
OURS = {"migrate", "api", "scheduler", "files", "callbacks", "worker"}


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = compose_file(SECRETS)["services"]
    return found


def _stages() -> dict[str, str]:
    """What the Dockerfile says of each stage, by name."""
    return dict(re.findall(r"^FROM [^\n]* AS (\w+)\n(.*?)(?=^FROM|\Z)", DOCKERFILE, re.M | re.S))


def test_the_file_obeys_the_compose_specification() -> None:
    checked = subprocess.run(
        [
            *(sys.executable, "-m", "check_jsonschema"),
            *("--builtin-schema", "vendor.compose-spec", str(COMPOSE)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout


def test_it_holds_the_whole_service(services: dict[str, Any]) -> None:
    assert services.keys() == OURS | {"postgres", "redis"}
    assert services["scheduler"]["deploy"]["replicas"] == 2
    devices = services["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices[0]["capabilities"] == ["gpu"]


@pytest.mark.parametrize("missing", sorted(SECRETS))
def test_nothing_starts_without_its_own_secrets(missing: str) -> None:
    given = {name: value for name, value in SECRETS.items() if name != missing}
    with pytest.raises(KeyError, match=missing):
        compose_file(given)


def test_only_the_api_is_published(services: dict[str, Any]) -> None:
    assert [name for name, service in services.items() if service.get("ports")] == ["api"]
    assert not [name for name, service in services.items() if "network_mode" in service]


def test_who_needs_a_server_waits_until_it_is_well(services: dict[str, Any]) -> None:
    for name in ("postgres", "redis", "api"):
        assert services[name]["healthcheck"]["test"]
    for name in OURS - {"migrate"}:
        assert services[name]["depends_on"] == {
            "migrate": {"condition": "service_completed_successfully"},
            "redis": {"condition": "service_healthy"},
        }
    assert services["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}


def test_the_api_has_the_time_it_takes_to_finish_what_is_under_way(
    services: dict[str, Any],
) -> None:
    assert int(services["api"]["stop_grace_period"].removesuffix("s")) > GRACE_S


@pytest.mark.parametrize("name", sorted(OURS))
def test_each_command_is_one_of_ours(services: dict[str, Any], name: str) -> None:
    command: Any = cli
    for word in services[name]["command"]:
        command = command.get_command(click.Context(command), word)
    assert command is not None


@pytest.mark.parametrize("name", sorted(OURS))
def test_each_variable_is_a_setting_with_a_value_it_takes(
    services: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {f"QLM_{field.upper()}" for field in Settings.model_fields}
    known |= {"DATABASE_URL", "REDIS_URL", "HF_TOKEN"}
    variables = services[name]["environment"]
    assert variables.keys() <= known
    for variable, value in variables.items():
        monkeypatch.setenv(variable, str(value))
    settings = Settings()
    assert settings.database_url == "postgresql://qlm:one@postgres:5432/qlm"
    assert settings.redis_url == "redis://:two@redis:6379/0"
    if name == "worker":
        assert settings.models == ("m",)


def test_every_stage_named_is_in_the_dockerfile_and_runs_unprivileged(
    services: dict[str, Any],
) -> None:
    stages = _stages()
    for name in OURS:
        stage = stages[services[name]["build"]["target"]]
        assert "USER qlm" in stage
        assert 'ENTRYPOINT ["qlm"]' in stage
    for copied in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.M):
        for path in copied.split():
            assert (CHECKOUT / path).exists()


@pytest.mark.parametrize("name", sorted(OURS))
def test_each_volume_is_a_folder_of_the_image_that_its_user_owns(
    services: dict[str, Any], name: str
) -> None:
    stage = _stages()[services[name]["build"]["target"]]
    (made,) = re.findall(r"mkdir (?:-p )?(.*?) &&", stage)
    (owned,) = re.findall(r"chown (?:-R )?qlm:qlm ([^\n]*)", stage)
    for volume in services[name]["volumes"]:
        folder = volume.partition(":")[2]
        assert folder in made.split()
        assert any(folder.startswith(owner) for owner in owned.split())
