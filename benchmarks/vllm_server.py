"""vLLM's own OpenAI server as a process, for comparison."""

from __future__ import annotations

import contextlib
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.support import free_port, wait_until
from qlm_batch.embedded.process import ManagedProcess, ProcessSpec

START_S = 240.0


@contextlib.contextmanager
def vllm_server(arguments: Mapping[str, object], log: Path) -> Iterator[str]:
    """Its base URL, `/v1` not included; ended on leaving."""
    port = free_port()
    options: list[str] = []
    for name, value in arguments.items():
        flag = f"--{name.replace('_', '-')}"
        options += [flag] if value is True else [flag, str(value)]
    process = ManagedProcess(
        ProcessSpec(
            name="vllm",
            argv=[
                *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
                *("--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"),
                *options,
            ],
            log=log,
            env={
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_LOGGING_LEVEL": "WARNING",
                "VLLM_NO_USAGE_STATS": "1",
                "HF_HUB_OFFLINE": "1",
            },
        )
    )
    url = f"http://127.0.0.1:{port}"
    process.start()
    try:
        wait_until(lambda: not process.alive() or _answers(url), "vLLM's server", START_S, 0.2)
        if not process.alive():
            raise SystemExit(f"vLLM's server ended:\n{process.log_tail(30)}")
        yield url
    finally:
        process.stop()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
