"""`make demo` shows the main job, and fails when any of it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.ports import free_port

from .conftest import CHECKOUT, user_environment

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_the_demo_works_and_leaves_no_process(tmp_path: Path) -> None:
    data = tmp_path / "demo"
    outcome = subprocess.run(
        [
            sys.executable, "-m", "qlm_cli", "demo", "--json",
            "--data-dir", str(data), "--port", str(free_port()),
        ],
        env=user_environment(tmp_path, free_port()),
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stdout[-2000:] + outcome.stderr[-4000:]
    report = json.loads(outcome.stdout)
    assert report["passed"] and report["webhook_verified"] and report["email_arrived"]
    assert sum(batch["completed"] for batch in report["batches"]) >= 200
    assert report["right"] >= 0.9
    left = [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(data) in " ".join(process.info["cmdline"] or [])
    ]
    assert left == []
