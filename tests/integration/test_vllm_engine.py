"""vLLM in process: what ends with it, and what it says when it cannot start."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from qlm_batch.domain.engine import EngineAnswer, EngineRequest
from qlm_batch.domain.errors import ConfigurationError, EngineDead
from qlm_batch.domain.jobs import CHAT, EngineKind
from qlm_batch.settings import Settings
from qlm_workers.engines import make_engine
from tests.contract.waiting import until

MODEL = "qlm-tiny"
KV_BYTES = 64 * 1024**2


def needs_vllm(test: Callable[..., object]) -> Callable[..., object]:
    """Mark a test that starts a real engine."""
    absent = importlib.util.find_spec("vllm") is None
    skip = pytest.mark.skipif(absent, reason="vllm is not installed")
    marked: Callable[..., object] = pytest.mark.vllm(pytest.mark.slow(skip(test)))
    return marked


KILLED_WORKER = f"""
import asyncio
from qlm_batch.domain.jobs import EngineKind
from qlm_batch.settings import Settings
from qlm_workers.engines import make_engine

async def main():
    engine = make_engine(Settings(kv_cache_bytes={KV_BYTES}), {MODEL!r}, EngineKind.GENERATE)
    await engine.start()
    print("ready", flush=True)
    await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(main())
"""


STOPPED_WORKER = f"""
import asyncio, json, signal
from itertools import count
from qlm_batch.domain.engine import EngineRequest
from qlm_batch.domain.jobs import CHAT, EngineKind
from qlm_batch.settings import Settings
from qlm_workers.engines import make_engine

async def main():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    engine = make_engine(Settings(kv_cache_bytes={KV_BYTES}), {MODEL!r}, EngineKind.GENERATE)
    await engine.start()
    messages = [dict(role="user", content="Hi.")]
    body = json.dumps(dict(model={MODEL!r}, messages=messages, max_tokens=1500, ignore_eos=True))

    async def ask():
        # Without end: nobody knows how soon the other side says its word.
        for number in count():
            await engine.answer(EngineRequest(f"r{{number}}", CHAT, body, 5, ""))

    task = asyncio.create_task(ask())
    while engine.stats().generated_tokens < 5:
        await asyncio.sleep(0.01)
    print("ready", flush=True)
    await asyncio.to_thread(input)
    before = engine.stats().step
    while engine.stats().step < before + 5:
        await asyncio.sleep(0.01)
    await engine.stop()
    await asyncio.gather(task, return_exceptions=True)
    print("stopped", flush=True)

if __name__ == "__main__":
    asyncio.run(main())
"""


def wait_until(condition: Callable[[], bool], what: str, within_s: float = 30) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not in {within_s} s: {what}"
        time.sleep(0.05)


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def chat(name: str = "r1") -> EngineRequest:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "What is 3 plus 4?"}],
        "max_tokens": 1500,
        "ignore_eos": True,
    }
    return EngineRequest(name, CHAT, json.dumps(body), 5, "tenant-a")


@needs_vllm
def test_a_killed_worker_leaves_no_engine(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(KILLED_WORKER)
    worker = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    assert worker.stdout.readline() == "ready\n"
    family = psutil.Process(worker.pid).children(recursive=True)
    assert any("qlm_workers.guardian" in " ".join(process.cmdline()) for process in family)
    assert len(family) >= 3
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    wait_until(lambda: not any(map(alive, family)), "every process of the engine is gone")


@needs_vllm
def test_ctrl_c_leaves_the_engine_to_its_worker_which_stops_it_without_a_trace(
    tmp_path: Path,
) -> None:
    script = tmp_path / "worker.py"
    script.write_text(STOPPED_WORKER)
    with (tmp_path / "log").open("w+") as told:
        worker = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=told,
            text=True,
            start_new_session=True,
            env={
                **os.environ,
                "VLLM_LOGGING_LEVEL": "WARNING",
                "VLLM_LOGGING_STREAM": "ext://sys.stderr",
            },
        )
        assert worker.stdin is not None
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        os.killpg(worker.pid, signal.SIGINT)
        worker.stdin.write("\n")
        worker.stdin.flush()
        assert worker.stdout.readline() == "stopped\n"
        assert worker.wait(30) == 0
        told.seek(0)
        log = told.read()
    assert "Traceback" not in log
    assert "leaked" not in log
    # vLLM says so of a process that did not end by itself in time.
    assert "SIGKILL" not in log
    assert "force killing" not in log


@needs_vllm
async def test_a_dead_engine_core_fails_what_is_inside_and_stops_clean() -> None:
    before = set(psutil.Process().children(recursive=True))
    engine = make_engine(Settings(kv_cache_bytes=KV_BYTES, slots=1), MODEL, EngineKind.GENERATE)
    await engine.start()
    # Most of them wait inside for those before: they cannot be answered before the engine dies.
    asked = [chat(f"r{number}") for number in range(64)]
    pending = [asyncio.create_task(engine.answer(request)) for request in asked]
    await until(lambda: engine.stats().generated_tokens >= 3, "tokens come")
    family = [
        process for process in psutil.Process().children(recursive=True) if process not in before
    ]
    for process in family:
        if "EngineCore" in process.name() or "EngineCore" in " ".join(process.cmdline()):
            os.kill(process.pid, signal.SIGKILL)
    told = await asyncio.wait_for(asyncio.gather(*pending, return_exceptions=True), 30)
    assert {type(one) for one in told} <= {EngineDead, EngineAnswer}
    assert isinstance(told[-1], EngineDead)
    with pytest.raises(EngineDead):
        engine.stats()
    await engine.stop()
    left = [" ".join(process.cmdline()) for process in family if alive(process)]
    assert [words for words in left if "resource_tracker" not in words] == []


@needs_vllm
async def test_the_end_of_one_engine_leaves_another_alone() -> None:
    first, second = (
        make_engine(Settings(kv_cache_bytes=KV_BYTES), MODEL, EngineKind.GENERATE) for _ in range(2)
    )
    try:
        await first.start()
        await second.start()
        await first.stop()
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi."}], "max_tokens": 4}
        answer = await second.answer(EngineRequest("r1", CHAT, json.dumps(body), 5, ""))
        assert answer.status_code == 200, answer.body
    finally:
        await second.stop()
        await first.stop()


@needs_vllm
async def test_an_engine_that_ends_while_it_starts_is_started_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from qlm_workers import vllm_api

    build, ends = vllm_api.build, [RuntimeError("Engine core initialization failed.")]

    def brittle(*arguments: Any) -> Any:
        if ends:
            raise ends.pop()
        return build(*arguments)

    monkeypatch.setattr(vllm_api, "build", brittle)
    engine = make_engine(Settings(kv_cache_bytes=KV_BYTES), MODEL, EngineKind.GENERATE)
    info = await engine.start()
    await engine.stop()
    assert info.model == MODEL
    ends[:] = [RuntimeError("out of memory"), RuntimeError("out of memory")]
    with pytest.raises(ConfigurationError, match="out of memory"):
        await make_engine(Settings(), MODEL, EngineKind.GENERATE).start()
    assert ends == []


@needs_vllm
async def test_an_engine_nobody_waits_for_any_more_is_not_started_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from qlm_workers import vllm_api

    ended, builds = threading.Event(), []

    def killed(*_: object) -> None:
        builds.append(1)
        ended.wait(30)
        raise RuntimeError("Engine core initialization failed.")

    monkeypatch.setattr(vllm_api, "build", killed)
    settings = Settings(kv_cache_bytes=KV_BYTES, start_timeout_s=0.5)
    engine = make_engine(settings, MODEL, EngineKind.GENERATE)
    with pytest.raises(ConfigurationError, match="QLM_START_TIMEOUT_S"):
        await engine.start()
    ended.set()
    await engine.stop()
    assert builds == [1]


@needs_vllm
@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (Settings(max_model_len=100_000, kv_cache_bytes=KV_BYTES), "max_model_len"),
        (Settings(engine_args={"max_modle_len": 4}), "no argument 'max_modle_len'"),
        (Settings(kv_cache_bytes=2**50), "of memory are free"),
        (Settings(max_model_len=2048, kv_cache_bytes=1024**2), "raise QLM_KV_CACHE_BYTES"),
        (Settings(start_timeout_s=0.01), "QLM_START_TIMEOUT_S"),
        (Settings(tool_parser="parrot"), "no tool parser 'parrot'.*hermes"),
    ],
)
async def test_what_cannot_start_says_why(settings: Settings, problem: str) -> None:
    engine = make_engine(settings, MODEL, EngineKind.GENERATE)
    with pytest.raises(ConfigurationError, match=problem):
        await engine.start()
    with pytest.raises(EngineDead):
        await engine.answer(chat())
    await engine.stop()


@needs_vllm
async def test_a_model_whose_tool_calls_can_be_read_calls_tools() -> None:
    engine = make_engine(
        Settings(kv_cache_bytes=KV_BYTES, tool_parser="hermes"), MODEL, EngineKind.GENERATE
    )
    await engine.start()
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "What is the capital of Peru?"}],
        "tools": [{"type": "function", "function": {"name": "look", "parameters": {}}}],
        "tool_choice": "required",
        "max_tokens": 200,
        "temperature": 0,
    }
    try:
        answer = await engine.answer(EngineRequest("r1", CHAT, json.dumps(body), 5, ""))
    finally:
        await engine.stop()
    assert answer.status_code == 200, answer.body
    (choice,) = json.loads(answer.body)["choices"]
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["look"]


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(ConfigurationError, match="no model folder /nowhere/model"):
        make_engine(Settings(), "/nowhere/model", EngineKind.GENERATE)


async def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    engine = make_engine(Settings(), str(tmp_path), EngineKind.GENERATE)
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        await engine.start()


async def test_a_worker_without_vllm_is_told_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("qlm_workers.vllm_engine.find_spec", lambda _: None)
    engine = make_engine(Settings(), str(tmp_path), EngineKind.GENERATE)
    with pytest.raises(ConfigurationError, match="make setup"):
        await engine.start()
