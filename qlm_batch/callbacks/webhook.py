"""Sends events over HTTP as Standard Webhooks asks."""

from __future__ import annotations

import asyncio
import functools
import math
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx
from standardwebhooks import Webhook

from qlm_batch.callbacks.outcome import Outcome
from qlm_batch.callbacks.payload import event_body
from qlm_batch.callbacks.targets import Target, resolve_target
from qlm_batch.domain.errors import QlmError
from qlm_batch.domain.jobs import OutboxItem

_BODY_BYTES = 1024 * 1024
"""A receiver that answers with more is cut off, and the attempt has failed."""
_GONE = 410


@dataclass(frozen=True, slots=True)
class WebhookConfig:
    """`timeout_s` bounds a whole attempt after name resolution; `allow` is the operator's list."""

    timeout_s: float = 20.0
    allow: tuple[str, ...] = ()
    user_agent: str = "qlm-batch"


def send_webhook(item: OutboxItem, secrets: Sequence[str], config: WebhookConfig) -> Outcome:
    """Make one attempt. Only a 2xx answer is a success; redirects are never followed.

    Blocks for up to the time-out and the resolver's time; a receiver's faults never raise.
    """
    try:
        target = resolve_target(item.target, config.allow)
    except QlmError as error:
        return Outcome(False, error.message)
    try:
        return asyncio.run(_post(target, event_body(item), item.event_id, secrets, config))
    except TimeoutError:
        return Outcome(False, f"no complete answer within {config.timeout_s:g} s")
    except httpx.HTTPError as error:
        return Outcome(False, f"{type(error).__name__}: {error}"[:500])


def signed_headers(
    event_id: str, body: bytes, secrets: Sequence[str], now: float
) -> dict[str, str]:
    """The three Standard Webhooks headers, with a signature for each secret."""
    moment = datetime.fromtimestamp(int(now), UTC)
    text = body.decode()
    signatures = (Webhook(secret).sign(event_id, moment, text) for secret in secrets)
    return {
        "webhook-id": event_id,
        "webhook-timestamp": str(int(now)),
        "webhook-signature": " ".join(signatures),
    }


@functools.cache
def _tls() -> ssl.SSLContext:
    """Shared by all attempts: reading the certificates of the authorities takes a while."""
    return httpx.create_ssl_context(trust_env=False)


async def _post(
    target: Target, body: bytes, event_id: str, secrets: Sequence[str], config: WebhookConfig
) -> Outcome:
    headers = signed_headers(event_id, body, secrets, time.time()) | {
        "host": target.url.netloc.decode("ascii"),
        "content-type": "application/json",
        "user-agent": config.user_agent,
        "accept-encoding": "identity",
    }
    client = httpx.AsyncClient(
        verify=_tls(), trust_env=False, follow_redirects=False, timeout=config.timeout_s
    )
    async with asyncio.timeout(config.timeout_s), client:
        for address in target.addresses[:-1]:
            try:
                return await _post_to(client, target, address, body, headers)
            except httpx.ConnectError:
                continue
        return await _post_to(client, target, target.addresses[-1], body, headers)


async def _post_to(
    client: httpx.AsyncClient, target: Target, address: str, body: bytes, headers: dict[str, str]
) -> Outcome:
    """Post to a checked address under the name it was checked for."""
    url = target.url.copy_with(host=address, fragment=None)
    extensions = {"sni_hostname": target.host}
    async with client.stream(
        "POST", url, content=body, headers=headers, extensions=extensions
    ) as response:
        received = 0
        async for chunk in response.aiter_raw():
            received += len(chunk)
            if received > _BODY_BYTES:
                return Outcome(False, f"the answer is longer than {_BODY_BYTES:,} bytes")
        status = response.status_code
        wait = response.headers.get("retry-after")
    detail = f"HTTP {status}"
    if 300 <= status < 400:
        detail += "; redirects are not followed, give the final URL"
    return Outcome(
        ok=200 <= status < 300,
        detail=detail,
        status_code=status,
        retry_after_s=retry_after_s(wait, time.time()),
        gone=status == _GONE,
    )


def retry_after_s(value: str | None, now: float) -> float | None:
    """Seconds a Retry-After header asks for, as a number or a date; None when it asks none."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - now
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
