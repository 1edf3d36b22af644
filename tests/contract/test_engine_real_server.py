"""The engine over HTTP in front of vLLM's own server."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest

from qlm_batch.domain.engine import EngineRequest, Lso
from qlm_batch.domain.jobs import CHAT
from qlm_batch.models import resolve_model
from qlm_workers.openai_engine import OpenAIEngine
from tests.ports import free_port

MODEL = "qlm-tiny"
KV_BYTES = 64 * 1024**2

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]


@contextlib.contextmanager
def starting_server(**further: str) -> Iterator[str]:
    """The address of a vLLM server that is starting, with priority scheduling and two slots."""
    port = free_port()
    arguments = {
        "model": resolve_model(MODEL),
        "served-model-name": MODEL,
        "host": "127.0.0.1",
        "port": port,
        "scheduling-policy": "priority",
        "max-num-seqs": 2,
        "kv-cache-memory-bytes": KV_BYTES,
        **{name.replace("_", "-"): value for name, value in further.items()},
    }
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"),
            *(f"--{name}={value}" for name, value in arguments.items()),
        ],
        env=os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield f"http://127.0.0.1:{port}"
        server.terminate()
        server.wait(60)
    finally:
        with_group_gone(server)


@pytest.fixture
def server_url() -> Iterator[str]:
    """A plain server."""
    with starting_server() as url:
        yield url


def with_group_gone(server: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the server's session."""
    try:
        os.killpg(server.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    server.wait()


def chat(number: int, priority: int, tokens: int) -> EngineRequest:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": f"What is {number} plus 4?"}],
        "max_tokens": tokens,
        "ignore_eos": True,
    }
    return EngineRequest(f"r{number}", CHAT, json.dumps(body), priority, "tenant-a")


async def told(server: httpx.AsyncClient, name: str) -> float:
    """What the server's metrics say of `name`."""
    metrics = (await server.get("/metrics")).text
    (value,) = re.findall(rf"^vllm:{name}{{.*}} (\S+)$", metrics, re.MULTILINE)
    return float(value)


async def test_a_running_vllm_is_probed_and_keeps_priorities(server_url: str) -> None:
    engine = OpenAIEngine(server_url, MODEL, slots=16, start_timeout_s=200)
    info = await engine.start()
    assert engine.facts is not None
    assert engine.facts.is_vllm
    assert engine.facts.takes_priority
    assert {Lso.PULL, Lso.BALANCE} <= info.supports
    assert info.max_model_len == 2048
    assert info.kv_tokens >= 2048
    finished: list[str] = []

    async def serve(name: str, request: EngineRequest) -> None:
        answer = await engine.answer(request)
        assert answer.status_code == 200, answer.body
        finished.append(name)

    async with httpx.AsyncClient(base_url=server_url, timeout=60) as server:

        async def waiting(many: int) -> None:
            while await told(server, "num_requests_waiting") < many:
                assert not finished, "not all were seen waiting in the server"
                await asyncio.sleep(0.02)

        # They take both slots, three times over.
        hogs = [asyncio.create_task(serve("hog", chat(i, 5, 1900 - i))) for i in range(6)]
        await waiting(4)
        late = [asyncio.create_task(serve("late", chat(10 + i, 9, 4))) for i in range(3)]
        await waiting(7)
        urgent = asyncio.create_task(serve("urgent", chat(20, 1, 4)))
        await asyncio.gather(urgent, *late)
    assert next(name for name in finished if name != "hog") == "urgent"
    assert finished.index("urgent") < len(hogs)
    await asyncio.gather(*hogs)
    await engine.stop()


async def test_a_servers_owner_makes_it_evict_by_one_flag() -> None:
    due = 1_900_000_000
    with starting_server(
        scheduler_cls="qlm_workers.evicting_scheduler.EvictingScheduler",
        additional_config='{"qlm": {"favour": "throughput"}}',
    ) as url:
        engine = OpenAIEngine(url, MODEL, slots=8, start_timeout_s=200)
        await engine.start()
        async with httpx.AsyncClient(base_url=url, timeout=60) as server:
            hogs = [asyncio.create_task(engine.answer(chat(i, due + i, 1900))) for i in range(2)]
            while await told(server, "num_requests_running") < 2:
                assert not any(hog.done() for hog in hogs), "never seen side by side"
                await asyncio.sleep(0.02)
            urgent = await engine.answer(chat(20, 0, 4))
            assert urgent.status_code == 200
            assert not any(hog.done() for hog in hogs)
            answers = await asyncio.gather(*hogs)
            # It is counted with the victim's next token.
            assert await told(server, "num_preemptions_total") >= 1
        assert [answer.usage.output_tokens for answer in answers] == [1900, 1900]
        await engine.stop()
