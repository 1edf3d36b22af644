"""The Celery application shared by those who send hints and by the workers; no engine is near."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, urlsplit

from celery import Celery
from kombu import Queue

from qlm_batch.domain.errors import ConfigurationError

ASSIGNED_TASK = "qlm.assigned"
INTERACTIVE_TASK = "qlm.interactive"
STOPPED_COMMAND = "qlm_stopped"
"""The remote-control command every worker gets when slices of a batch were closed."""

BATCH_PRIORITY = 9
"""Last on Redis, where 0 comes first and is what kombu sends when nothing is set."""
INTERACTIVE_PRIORITY = 0

_SCHEMES = ("redis://", "rediss://", "redis+socket://", "unix://")


def batch_queue(instance: str) -> str:
    """The queue with hints of batch work for an instance."""
    return f"gpu.{instance}"


def interactive_queue(instance: str) -> str:
    """The queue with interactive work for an instance."""
    return f"i.{instance}"


def broker_url(redis_url: str) -> str:
    """The URL as Celery wants it. ConfigurationError unless it names a Redis or Valkey server."""
    if not redis_url.startswith(_SCHEMES):
        raise ConfigurationError(
            f"REDIS_URL must begin with one of {', '.join(_SCHEMES)}; got "
            f"{redis_url.split(':', 1)[0] + ':…' if redis_url else 'nothing'}"
        )
    if redis_url.startswith("unix://"):
        path, _, query = redis_url.removeprefix("unix://").partition("?")
        database = next((p[3:] for p in query.split("&") if p.startswith("db=")), "0")
        return f"redis+socket://{path}?virtual_host={database}"
    try:
        _ = urlsplit(redis_url).port
    except ValueError:
        raise ConfigurationError(
            "REDIS_URL must look like redis://:password@host:6379/0; in a password @ is written %40"
            " and / %2F"
        ) from None
    return redis_url


def client_url(redis_url: str) -> str:
    """The URL as redis-py wants it. ConfigurationError unless it names a server."""
    url = broker_url(redis_url)
    if not url.startswith("redis+socket://"):
        return url
    path, _, query = url.removeprefix("redis+socket://").partition("?")
    database = parse_qs(query).get("virtual_host", ["0"])[0]
    return f"unix://{path}?db={database}"


def make_app(
    redis_url: str,
    *,
    instance: str | None = None,
    timeout_s: float = 10.0,
    connections: int = 2,
) -> Celery:
    """An application on this broker: a worker's when it names its instance, else a sender's.

    A sender gives up on a broker that does not answer within `timeout_s`, and sends over as many
    `connections` at a time; a worker tries for ever.
    """
    transport: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "socket_keepalive": True,
        "queue_order_strategy": "priority",
    }
    if instance is None:
        transport |= {
            "max_retries": 0,
            "interval_start": 0,
            "interval_step": 0,
            "interval_max": 0,
            "connect_retries_timeout": timeout_s,
        }
    app = Celery("qlm", set_as_current=instance is not None)
    app.conf.update(
        broker_url=broker_url(redis_url),
        broker_transport_options=transport,
        broker_connection_timeout=timeout_s,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_pool_limit=connections,
        result_backend="disabled://",
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        task_serializer="json",
        accept_content=["json"],
        task_default_queue="unrouted",
        task_default_priority=BATCH_PRIORITY,
        task_publish_retry=False,
        worker_prefetch_multiplier=1,
        worker_cancel_long_running_tasks_on_connection_loss=True,
        worker_enable_prefetch_count_reduction=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_send_task_events=False,
        worker_soft_shutdown_timeout=0.0,
        control_queue_ttl=60.0,
    )
    if instance is not None:
        # Nothing is acknowledged: what is lost is sent again by whoever waits, or polled for.
        app.conf.task_queues = [
            Queue(name, routing_key=name, no_ack=True)
            for name in (interactive_queue(instance), batch_queue(instance))
        ]
    return app
