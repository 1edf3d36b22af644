"""The command line as such: what it lists, loads and says when it cannot go on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from qlm_batch.api.limits import LIMITS
from qlm_cli.batches import endpoint_of, peekable
from qlm_cli.client import Client
from qlm_cli.main import COMMANDS, cli, main


def _run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["qlm", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
        raise SystemExit(0)
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def test_the_help_lists_every_command_in_order() -> None:
    text = CliRunner().invoke(cli, ["--help"]).output
    places = [text.index(f"\n  {name} ") for name in COMMANDS]
    assert places == sorted(places)


def test_the_help_tells_what_the_readme_does_of_exit_statuses() -> None:
    readme = Path(__file__).parents[2] / "README.md"
    told = [
        re.findall(r"\b\d+\b", text.partition("Exit status: ")[2].partition(".\n")[0])
        for text in (CliRunner().invoke(cli, ["--help"]).output, readme.read_text())
    ]
    assert told[0] == told[1] == ["0", "1", "2", "3", "4", "78"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    outcome = CliRunner().invoke(cli, [name, "--help"])
    assert outcome.exit_code == 0
    assert len(outcome.output.splitlines()) > 3


def _options(command: click.Command) -> Iterator[click.Option]:
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            part = command.get_command(click.Context(command), name)
            assert part is not None
            yield from _options(part)
    yield from (option for option in command.params if isinstance(option, click.Option))


def test_every_option_explains_itself() -> None:
    assert [option.name for option in _options(cli) if not option.help] == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_name_the_command(shell: str) -> None:
    outcome = CliRunner().invoke(cli, ["completion", shell])
    assert "_QLM_COMPLETE" in outcome.output


def test_a_client_command_starts_without_the_service(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['qlm', 'list', '--data-dir', sys.argv[1]]\n"
        "from qlm_cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print({'sqlalchemy', 'celery', 'fastapi', 'torch', 'vllm'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_without_a_service_a_client_says_how_to_start_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("QLM_URL", raising=False)
    status, _, said = _run(capsys, monkeypatch, "list", "--data-dir", str(tmp_path))
    assert status == 4 and "qlm up" in said


@pytest.mark.parametrize("url", ["here:80", "http://[::1", "http://here:port", "https://"])
def test_an_address_that_is_none_is_refused_with_an_example(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    status, _, said = _run(capsys, monkeypatch, "list", "--url", url, "--key", "k")
    assert status == 1
    assert url in said
    assert "http://127.0.0.1:8600" in said


@pytest.mark.parametrize("key", ["sk-qlm-…", "sk-qlm-a\nb"])
def test_a_key_that_cannot_be_sent_is_told_before_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    status, _, said = _run(capsys, monkeypatch, "list", "--url", "http://127.0.0.1:9", "--key", key)
    assert status == 1 and "QLM_API_KEY" in said


@pytest.mark.parametrize("command", [["list"], ["keys", "list"]])
def test_a_folder_of_someone_else_is_told(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    command: list[str],
) -> None:
    monkeypatch.delenv("QLM_URL", raising=False)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    # Not readable, whoever runs the tests: root may read what others may not.
    (tmp_path / "service.json").mkdir()
    status, _, said = _run(capsys, monkeypatch, *command, "--data-dir", str(tmp_path))
    assert status == 1 and "service.json" in said


def test_results_that_cannot_be_written_are_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Client, "download", lambda *_args, **_more: iter([b"{}\n"]))
    target = tmp_path / "nowhere" / "results.jsonl"
    status, _, said = _run(
        capsys,
        monkeypatch,
        *("results", "batch_1", "--partial", "-o", str(target)),
        *("--url", "http://127.0.0.1:9", "--key", "k"),
    )
    assert status == 1 and str(target) in said
    assert CliRunner().invoke(cli, ["results", "b", "-o", str(tmp_path)]).exit_code == 2


@pytest.mark.parametrize(
    ("ended", "followed"), [("completed", 0), ("failed", 3), ("expired", 3), ("cancelled", 3)]
)
def test_a_batch_that_was_followed_decides_the_exit_status_and_one_looked_at_does_not(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    ended: str,
    followed: int,
) -> None:
    batch = {
        "id": "batch_1",
        "status": ended,
        "request_counts": {"total": 1, "completed": 0, "failed": 1},
        "expires_at": 1_800_000_000,
    }
    monkeypatch.setattr(Client, "get", lambda *_args, **_more: batch)
    monkeypatch.setattr(Client, "post", lambda *_args, **_more: batch)
    at = ("batch_1", "--url", "http://127.0.0.1:9", "--key", "k")
    for command, status in (
        (("status",), 0),
        (("status", "--watch"), followed),
        (("retry", "--wait"), followed),
    ):
        found, printed, _ = _run(capsys, monkeypatch, *command, *at)
        assert (found, ended in printed) == (status, True)


def test_the_help_names_every_limit_of_a_key() -> None:
    text = CliRunner().invoke(cli, ["keys", "create", "--help"]).output
    assert all(f"{name}=" in text for name in LIMITS)


def test_errors_are_json_when_json_is_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("QLM_URL", raising=False)
    _, printed, _ = _run(capsys, monkeypatch, "list", "--json", "--data-dir", str(tmp_path))
    assert set(json.loads(printed)["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("command", ["up", "demo"])
def test_a_port_there_cannot_be_is_a_wrong_usage(command: str) -> None:
    outcome = CliRunner().invoke(cli, [command, "--port", "99999"])
    assert outcome.exit_code == 2
    assert "--port" in outcome.output


@pytest.mark.parametrize(
    ("setting", "value"),
    [("port", "eighty"), ("slots", "0"), ("slice_requests", "0"), ("tick_s", "-1")],
)
def test_an_unusable_setting_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, setting: str, value: str
) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.setenv(f"QLM_{setting.upper()}", value)
    status, _, said = _run(capsys, monkeypatch, "api")
    assert status == 78 and f"{setting}: " in said


def test_a_policy_there_is_not_stops_the_service_before_it_starts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("QLM_POLICY", "lifo")
    status, _, said = _run(capsys, monkeypatch, "up", "--data-dir", str(tmp_path))
    assert status == 78 and "QLM_POLICY" in said and "edf-shed" in said
    assert not any(tmp_path.iterdir())


def test_a_process_without_a_database_says_what_to_set() -> None:
    kept = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    done = subprocess.run(
        [sys.executable, "-m", "qlm_cli", "db", "upgrade"],
        env=kept,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 78 and "DATABASE_URL" in done.stderr


@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", b"\n\r\n"])
def test_the_endpoint_is_read_from_a_first_line_of_any_length(
    tmp_path: Path, before: bytes
) -> None:
    line = {"custom_id": "a", "body": {"prompt": "x" * 900_000}, "url": "/v1/completions"}
    content = before + json.dumps(line).encode() + b"\n" + b"{}\n" * 10
    path = tmp_path / "long.jsonl"
    path.write_bytes(content)
    with path.open("rb") as file, peekable(file) as source:
        assert endpoint_of(source) == "/v1/completions"
        assert source.read() == content


def test_the_endpoint_is_read_from_a_pipe_that_gives_a_line_in_pieces() -> None:
    line = json.dumps({"body": {"prompt": "x" * 300_000}, "url": "/v1/completions"}).encode()
    code = (
        "import sys\n"
        "from qlm_cli.batches import endpoint_of, peekable\n"
        "source = peekable(sys.stdin.buffer)\n"
        "print(endpoint_of(source), len(source.read()))"
    )
    done = subprocess.run([sys.executable, "-c", code], input=line, capture_output=True, check=True)
    assert done.stdout.decode().split() == ["/v1/completions", str(len(line))]
