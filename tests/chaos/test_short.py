"""The short form: every change goes through some minutes of faults, with real vLLM at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
SEED = os.environ.get("CHAOS_SEED", "1")


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_nothing_is_lost_whatever_is_broken() -> None:
    options = {"--seed": SEED, "--minutes": "1.5", "--real-requests": "150", "--real-kills": "1"}
    command = [
        sys.executable,
        "-m",
        "tests.chaos",
        *(word for pair in options.items() for word in pair),
    ]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert (figures["lost"], figures["duplicated"], figures["non_poison_errors"]) == (0, 0, 0)
    assert figures["requests"] > 1000
    assert figures["real_vllm"] == {"requests": 150, "kills": 1}
