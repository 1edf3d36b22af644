"""Interactive requests when something fails on the way: always an answer, never silence."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from subprocess import Popen

import httpx
import psutil
import pytest

from qlm_batch.domain.interactive import OPEN_INTERACTIVE, InteractiveState
from qlm_batch.domain.snapshot import InstanceState
from qlm_batch.embedded.postgres import EmbeddedPostgres
from qlm_batch.embedded.valkey import EmbeddedValkey
from tests.api_support import error_of, wait_until
from tests.integration.interactive_support import (
    Json,
    Line,
    api_line,
    chat,
    events,
    fresh_database,
    own_redis,
    text_of,
    whole_line,
)
from tests.integration.test_worker import worker

SLOW = {"simulated_time_scale": 4.0, "heartbeat_s": 0.3}
"""About 40 ms a token."""
LONG = {"stream": True, "max_tokens": 100, "ignore_eos": True}
ENDLESS = LONG | {"max_tokens": 2000}
"""More than a minute of tokens, for what has to happen before they are all there."""


@pytest.fixture(scope="module")
def shared(
    postgres: EmbeddedPostgres, valkey: EmbeddedValkey, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Line]:
    """One line for all tests that leave its worker alive."""
    with (
        fresh_database(postgres) as url,
        whole_line(url, own_redis(valkey.url, 1), tmp_path_factory.mktemp("line"), **SLOW) as line,
    ):
        yield line


@pytest.fixture
def line(shared: Line) -> Line:
    """The shared line, with nothing stored."""
    shared.forget()
    return shared


@pytest.fixture
def mortal(postgres_url: str, redis_url: str, data_dir: Path) -> Iterator[Line]:
    """A line whose worker may be ended."""
    with whole_line(postgres_url, redis_url, data_dir, **SLOW) as line:
        yield line


def data_of(lines: Iterator[str]) -> Iterator[Json]:
    """The events of a running stream."""
    for text in lines:
        if text.startswith("data: ") and text != "data: [DONE]":
            yield json.loads(text.removeprefix("data: "))


def raw(line: Line, body: Json) -> tuple[bytes, bytes]:
    """The head and the body of a call, as they go over a connection."""
    packed = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {httpx.URL(line.url).host}\r\n"
        f"authorization: Bearer {line.key}\r\ncontent-length: {len(packed)}\r\n\r\n"
    )
    return head.encode(), packed


def connection(line: Line) -> socket.socket:
    where = httpx.URL(line.url)
    return socket.create_connection((where.host, where.port or 80), timeout=30)


def hold(process: Popen[bytes]) -> None:
    """Let a worker stand still, and return once it does."""
    process.send_signal(signal.SIGSTOP)
    wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)


def listened_to(line: Line) -> bool:
    """Whether the server would give a message away as soon as it came."""
    clients = line.redis.client_list()
    return any(own["cmd"] == "brpop" and "b" in own["flags"] for own in clients)


def running(line: Line) -> int:
    return sum(view.interactive_running for view in line.bench.store.instances())


def ready(line: Line) -> set[str]:
    views = line.bench.store.instances()
    return {view.name for view in views if view.state is InstanceState.READY}


def states(line: Line) -> list[InteractiveState]:
    return [request.state for request in line.requests()]


def test_a_client_that_leaves_ends_its_request_and_leaves_nothing_behind(line: Line) -> None:
    with line.client() as client:
        with client.stream("POST", "/v1/chat/completions", json=chat(**ENDLESS)) as answer:
            next(data_of(answer.iter_lines()))
        wait_until(lambda: states(line) == [InteractiveState.ABORTED])
    wait_until(lambda: running(line) == 0)
    wait_until(lambda: not line.keys())


def test_a_client_that_leaves_before_the_answer_ends_its_request(line: Line) -> None:
    with connection(line) as asking:
        asking.sendall(b"".join(raw(line, chat(**ENDLESS | {"stream": False}))))
        wait_until(lambda: states(line) == [InteractiveState.RUNNING])
    wait_until(lambda: states(line) == [InteractiveState.ABORTED])
    wait_until(lambda: not line.keys())


def test_a_thousand_connections_opened_and_dropped_leave_nothing_behind(line: Line) -> None:
    head, body = raw(line, chat(**LONG))
    for number in range(1000):
        with connection(line) as asking:
            # Some leave before they have asked, some in the middle, most once they have.
            asking.sendall((head + body)[: (None, None, None, len(head) + 5, 20)[number % 5]])
    answer = line.post("/v1/chat/completions", chat())
    assert answer.status_code in (200, 429), answer.text
    wait_until(lambda: running(line) == 0 and not line.keys(), 60)
    wait_until(lambda: not OPEN_INTERACTIVE & set(states(line)))
    assert line.post("/v1/chat/completions", chat()).status_code == 200


def test_two_hundred_clients_that_come_and_go_leave_nothing_behind(line: Line) -> None:
    def visit() -> None:
        with line.client() as client:
            for _ in range(10):
                with client.stream("POST", "/v1/chat/completions", json=chat(**LONG)) as answer:
                    assert answer.status_code == 200
                    next(data_of(answer.iter_lines()))

    visitors = [threading.Thread(target=visit) for _ in range(20)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join(60)
    wait_until(lambda: running(line) == 0)
    wait_until(lambda: not line.keys())
    assert len(states(line)) == 200
    # A short answer may be there before its client has left.
    wait_until(lambda: set(states(line)) <= {InteractiveState.ABORTED, InteractiveState.DONE})
    assert line.post("/v1/chat/completions", chat()).status_code == 200


def test_a_flushed_redis_costs_a_stream_nothing_but_time(line: Line) -> None:
    whole = line.post("/v1/chat/completions", chat(max_tokens=100, ignore_eos=True)).json()
    with (
        line.client() as client,
        client.stream("POST", "/v1/chat/completions", json=chat(**LONG)) as answer,
    ):
        told = []
        for event in data_of(answer.iter_lines()):
            told.append(event)
            if len(told) in (5, 20, 40):
                line.redis.flushall()
    assert text_of(told) == whole["choices"][0]["message"]["content"]
    wait_until(lambda: not line.keys())


def test_a_lost_message_is_sent_again(line: Line) -> None:
    hold(line.workers[0])
    # Else the message would be with the worker already, and the flush would lose nothing.
    wait_until(lambda: not listened_to(line))
    answers: list[httpx.Response] = []
    caller = threading.Thread(
        target=lambda: answers.append(line.post("/v1/chat/completions", chat()))
    )
    caller.start()
    wait_until(lambda: bool(line.requests()))
    wait_until(lambda: bool(line.redis.keys("i.gpu-0*")))
    line.redis.flushall()
    line.workers[0].send_signal(signal.SIGCONT)
    caller.join(30)
    assert answers[0].status_code == 200


def test_a_worker_that_dies_in_the_middle_of_a_stream_ends_it_with_an_error(mortal: Line) -> None:
    with (
        mortal.client() as client,
        client.stream("POST", "/v1/chat/completions", json=chat(**ENDLESS)) as answer,
    ):
        lines = answer.iter_lines()
        next(data_of(lines))
        mortal.workers[0].kill()
        rest = [text for text in lines if text]
    assert rest[-1] == "data: [DONE]"
    error = json.loads(rest[-2].removeprefix("data: "))["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert states(mortal) == [InteractiveState.FAILED]
    wait_until(lambda: not mortal.keys())


def test_a_worker_that_is_told_to_end_finishes_what_it_has_begun(mortal: Line) -> None:
    with (
        mortal.client() as client,
        client.stream("POST", "/v1/chat/completions", json=chat(**LONG)) as answer,
    ):
        lines = answer.iter_lines()
        next(data_of(lines))
        mortal.workers[0].send_signal(signal.SIGTERM)
        told = list(data_of(lines))
        assert told[-1]["choices"][0]["finish_reason"] == "length"
    answer = mortal.post("/v1/chat/completions", chat())
    assert "ready" in str(error_of(answer, 503)["message"])
    assert int(answer.headers["retry-after"]) >= 1


def test_a_request_whose_worker_dies_before_the_first_token_is_answered_by_another(
    postgres_url: str, redis_url: str, data_dir: Path
) -> None:
    def start(line: Line, instance: str) -> AbstractContextManager[subprocess.Popen[bytes]]:
        return worker(line.bench, postgres_url, redis_url, data_dir, instance=instance, **SLOW)

    with (
        api_line(postgres_url, redis_url, data_dir, silent_s=5.0) as line,
        start(line, "gpu-0") as first,
        start(line, "gpu-1") as second,
    ):
        wait_until(lambda: ready(line) == {"gpu-0", "gpu-1"})
        workers = {"gpu-0": first, "gpu-1": second}
        for each in workers.values():
            hold(each)
        answers: list[httpx.Response] = []
        caller = threading.Thread(
            target=lambda: answers.append(line.post("/v1/chat/completions", chat(stream=True)))
        )
        caller.start()
        # Which of them gets it is for the router to say; that one never moves again.
        wait_until(lambda: bool(line.requests()))
        (other,) = workers.keys() - {line.requests()[0].instance}
        workers[other].send_signal(signal.SIGCONT)
        caller.join(60)
        (answer,) = answers
        assert answer.status_code == 200
        assert text_of(events(answer))
        (stored,) = line.requests()
        assert (stored.instance, stored.epoch) == (other, 2)


def test_calls_before_their_first_token_are_answered_at_once_when_their_worker_is_killed(
    postgres_url: str, redis_url: str, data_dir: Path
) -> None:
    silent_s = 60.0
    first_s: list[float] = []
    refused: list[str] = []

    def start(line: Line, instance: str, scale: float) -> AbstractContextManager[Popen[bytes]]:
        changes = {"instance": instance, "simulated_time_scale": scale, "heartbeat_s": 0.3}
        return worker(line.bench, postgres_url, redis_url, data_dir, **changes)

    def call(line: Line) -> None:
        with line.client(timeout=120) as client:
            while not killed.is_set():
                with client.stream("POST", "/v1/chat/completions", json=chat(stream=True)) as told:
                    if told.status_code != 200:
                        refused.append(told.read().decode())
                        return
                    next(data_of(told.iter_lines()))
                    first_s.append(time.monotonic())

    def stuck(line: Line) -> int:
        return sum(r.instance == "gpu-0" and r.state in OPEN_INTERACTIVE for r in line.requests())

    killed = threading.Event()
    # Steps of the first take minutes, so that none of its calls has a token yet.
    with (
        api_line(postgres_url, redis_url, data_dir, silent_s=silent_s) as line,
        start(line, "gpu-0", 1e5) as slow,
        start(line, "gpu-1", 1.0),
    ):
        wait_until(lambda: ready(line) == {"gpu-0", "gpu-1"})
        callers = [threading.Thread(target=call, args=(line,)) for _ in range(6)]
        for caller in callers:
            caller.start()
        wait_until(lambda: stuck(line) >= 3, 60)
        began = time.monotonic()
        slow.kill()
        killed.set()
        for caller in callers:
            caller.join(silent_s)
        assert refused == []
        assert stuck(line) == 0
        assert max(first_s) - began < silent_s / 2
        assert {r.instance for r in line.requests() if r.epoch == 2} == {"gpu-1"}


def test_a_client_that_stalls_does_not_hold_its_slot(line: Line) -> None:
    with (
        line.client() as client,
        client.stream("POST", "/v1/chat/completions", json=chat(**LONG)) as answer,
    ):
        lines = answer.iter_lines()
        next(data_of(lines))
        wait_until(lambda: states(line) == [InteractiveState.DONE], 60)
        wait_until(lambda: running(line) == 0)
        told = list(data_of(lines))
    assert told[-1]["choices"][0]["finish_reason"] == "length"


def test_without_a_broker_the_answer_says_so_at_once(
    postgres_url: str, redis_url: str, data_dir: Path, tmp_path: Path
) -> None:
    away = f"redis+socket://{tmp_path}/none.sock?virtual_host=0"
    with api_line(postgres_url, away, data_dir, broker_s=1.0) as line:
        line.bench.beat()
        error = error_of(line.post("/v1/chat/completions", chat()), 503)
        assert "try again" in str(error["message"])
        assert states(line) == [InteractiveState.ABORTED]
