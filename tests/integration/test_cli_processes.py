"""The single processes, started with settings that cannot work."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from qlm_batch.domain.errors import ConfigurationError
from qlm_cli.main import cli

DATABASE = {"DATABASE_URL": "postgresql://nobody@127.0.0.1:9/none"}
REDIS = {"REDIS_URL": "redis://127.0.0.1:9/0"}
SECRET = {"QLM_SECRET_KEY": "a key for tests"}
MODEL = {"QLM_MODELS": '["m"]', "QLM_ENGINE": "simulated"}


@pytest.mark.parametrize(
    ("process", "given", "named"),
    [
        ("worker", DATABASE | REDIS | SECRET, "QLM_MODELS"),
        ("worker", REDIS | SECRET | MODEL, "DATABASE_URL"),
        ("worker", DATABASE | SECRET | MODEL, "REDIS_URL"),
        ("worker", DATABASE | REDIS | MODEL, "QLM_SECRET_KEY"),
        ("api", {}, "DATABASE_URL"),
        ("api", DATABASE, "QLM_SECRET_KEY"),
        ("scheduler", DATABASE | SECRET, "REDIS_URL"),
        ("files", SECRET, "DATABASE_URL"),
        ("callbacks", SECRET, "DATABASE_URL"),
        ("files", {"DATABASE_URL": "mysql://x"} | SECRET, "DATABASE_URL"),
        ("files", {"DATABASE_URL": "postgresql://u@h:port/d"} | SECRET, "DATABASE_URL"),
        ("files", DATABASE | SECRET | {"QLM_BLOB_URL": "nowhere://x"}, "QLM_BLOB_URL"),
        ("scheduler", DATABASE | SECRET | {"REDIS_URL": "redis://:a/b@h:6379/0"}, "REDIS_URL"),
    ],
)
def test_a_process_that_cannot_work_says_which_setting_to_mend(
    monkeypatch: pytest.MonkeyPatch, process: str, given: dict[str, str], named: str
) -> None:
    for name in ("DATABASE_URL", "REDIS_URL", "QLM_SECRET_KEY", "QLM_MODELS"):
        monkeypatch.delenv(name, raising=False)
    done = CliRunner().invoke(cli, [process], env=given)
    assert isinstance(done.exception, ConfigurationError)
    assert named in done.exception.message
