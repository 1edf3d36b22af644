"""The shipped model answers held-out prompts through vLLM, and stops by itself."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from qlm_batch.models import prompts

REPOSITORY = Path(__file__).resolve().parents[2]
EVALUATE = REPOSITORY / "tools" / "tiny_model" / "evaluate.py"
PER_FAMILY = 12

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vllm is not installed, so the model cannot be served",
    ),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("form", ["chat", "completions"])
def test_the_shipped_model_is_right(form: str) -> None:
    """A process of its own keeps the engine's children and settings out of the test's process."""
    finished = subprocess.run(
        [sys.executable, str(EVALUATE), "--n", str(PER_FAMILY), "--form", form, "--seed", "77"],
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert finished.stdout, finished.stderr[-2000:]
    shares = json.loads(finished.stdout.splitlines()[-1])["families"]
    assert set(shares) == set(prompts.FAMILIES)
    assert sum(shares.values()) / len(shares) >= 0.95, shares
