"""Hints on a real broker."""

from __future__ import annotations

import json
import time
from base64 import b64decode
from pathlib import Path

import pytest
import redis
from structlog.testing import capture_logs

from qlm_batch.dispatch import wire
from qlm_batch.dispatch.celery_app import broker_url
from qlm_batch.dispatch.dispatcher import KEPT_S, CeleryDispatcher
from qlm_batch.domain.errors import ConfigurationError
from qlm_batch.domain.jobs import CHAT
from qlm_batch.domain.messages import Assigned, Interactive, Stopped

HINT = Assigned("gpu-7", "boot")
PATIENT_S = 30.0
"""For a broker that is there, and may be slow on a busy machine."""


def client(redis_url: str) -> redis.Redis:
    return redis.Redis(unix_socket_path=redis_url.split("//")[1].split("?")[0])


def test_a_batch_hint_waits_in_its_instances_queue_behind_everything_interactive(
    redis_url: str,
) -> None:
    dispatcher = CeleryDispatcher(redis_url, timeout_s=PATIENT_S)
    dispatcher.assigned(HINT)
    dispatcher.close()
    server = client(redis_url)
    keys = [key.decode() for key in server.scan_iter("gpu.gpu-7*")]
    assert keys == ["gpu.gpu-7\x06\x169"]
    (message,) = server.lrange(keys[0], 0, -1)
    server.close()
    envelope = json.loads(message)
    assert envelope["properties"]["priority"] == 9
    assert envelope["content-type"] == "application/json"
    _, kwargs, _ = json.loads(b64decode(envelope["body"]))
    assert wire.decode(kwargs["message"]) == HINT


def test_what_an_instance_never_takes_is_not_kept_for_ever(redis_url: str) -> None:
    dispatcher = CeleryDispatcher(redis_url, timeout_s=PATIENT_S)
    dispatcher.assigned(Assigned("gone", "boot"))
    dispatcher.interactive(
        Interactive("req_1", 1, "gone", "boot", "acme", CHAT, "m", "{}", True, 100.0, "api_1")
    )
    dispatcher.close()
    server = client(redis_url)
    queues = [*server.scan_iter("gpu.gone*"), *server.scan_iter("i.gone*")]
    assert len(queues) == 2
    assert all(0 < server.ttl(queue) <= KEPT_S for queue in queues)
    server.close()


def test_a_broker_that_is_away_costs_little_time_and_one_line_of_log(tmp_path: Path) -> None:
    dispatcher = CeleryDispatcher(f"redis+socket://{tmp_path}/none.sock?virtual_host=0")
    with capture_logs() as logs:
        began = time.monotonic()
        for _ in range(3):
            dispatcher.assigned(HINT)
            dispatcher.stopped(Stopped("batch_1"))
        assert time.monotonic() - began < 6 * 2.0
    assert [line["log_level"] for line in logs] == ["warning"]
    dispatcher.close()


def test_the_log_tells_when_the_broker_is_back(redis_url: str, tmp_path: Path) -> None:
    socket = tmp_path / "s"
    dispatcher = CeleryDispatcher(f"redis+socket://{socket}?virtual_host=0")
    with capture_logs() as logs:
        dispatcher.assigned(HINT)
        socket.symlink_to(redis_url.split("//")[1].split("?")[0])
        dispatcher.assigned(HINT)
        dispatcher.assigned(HINT)
    assert [line["log_level"] for line in logs] == ["warning", "info"]
    dispatcher.close()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("redis://localhost:6379/2", "redis://localhost:6379/2"),
        ("rediss://host/0", "rediss://host/0"),
        ("redis+socket:///a/b.sock?virtual_host=1", "redis+socket:///a/b.sock?virtual_host=1"),
        ("unix:///a/b.sock?db=3", "redis+socket:///a/b.sock?virtual_host=3"),
        ("unix:///a/b.sock", "redis+socket:///a/b.sock?virtual_host=0"),
    ],
)
def test_urls_of_redis_servers_are_taken_in_every_usual_form(given: str, expected: str) -> None:
    assert broker_url(given) == expected


@pytest.mark.parametrize("given", ["", "amqp://user:secret@host", "localhost:6379"])
def test_any_other_broker_is_refused_without_showing_a_password(given: str) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        broker_url(given)
    assert "REDIS_URL" in refusal.value.message
    assert "secret" not in refusal.value.message
