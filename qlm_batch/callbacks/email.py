"""Tells people by e-mail how their batch ended."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import EmailMessage
from email.utils import format_datetime, parseaddr
from urllib.parse import unquote, urlsplit

import aiosmtplib
import jinja2

from qlm_batch.callbacks.outcome import Outcome
from qlm_batch.domain.durations import in_words
from qlm_batch.domain.errors import ConfigurationError
from qlm_batch.domain.jobs import Batch, OutboxItem
from qlm_batch.domain.transitions import EVENT_OF

_LISTED_ERRORS = 10
_PERMANENT = range(500, 600)
_HEADLINES = {
    "batch.completed": "is complete",
    "batch.failed": "was refused",
    "batch.expired": "ran out of time",
    "batch.cancelled": "was cancelled",
}
_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("qlm_batch.callbacks"),
    autoescape=jinja2.select_autoescape(["html"]),
    undefined=jinja2.StrictUndefined,
)


@dataclass(frozen=True, slots=True)
class EmailConfig:
    """`smtp_url` is `smtp://user:password@host:port` or `smtps://…`; empty turns e-mail off.

    `public_url` is the base of the links, without a final slash.
    """

    smtp_url: str
    sender: str
    public_url: str
    timeout_s: float = 20.0


def send_email(item: OutboxItem, batch: Batch, config: EmailConfig) -> Outcome:
    """Make one attempt; blocks for up to the time-out. The mail server's faults never raise."""
    try:
        server = _server(config.smtp_url)
        message = compose(item, batch, config)
    except ConfigurationError as error:
        return Outcome(False, error.message)
    except ValueError as error:
        return Outcome(False, f"the address cannot be used: {error}"[:500], gone=True)
    try:
        asyncio.run(_send(message, server, config.timeout_s))
    except aiosmtplib.SMTPRecipientsRefused as refused:
        code = refused.recipients[0].code
        return Outcome(False, f"recipient refused: {refused}"[:500], code, gone=code in _PERMANENT)
    except aiosmtplib.SMTPResponseException as error:
        return Outcome(False, f"SMTP {error.code}: {error.message}"[:500], error.code)
    except TimeoutError:
        return Outcome(False, f"the mail server did not finish within {config.timeout_s:g} s")
    except (aiosmtplib.SMTPException, OSError) as error:
        return Outcome(False, f"{type(error).__name__}: {error}"[:500])
    return Outcome(True, "accepted by the mail server", 250)


def compose(item: OutboxItem, batch: Batch, config: EmailConfig) -> EmailMessage:
    """The message, in text and HTML; its Message-ID is the same for every attempt.

    ValueError when the recipient cannot stand in a header.
    """
    headline = _HEADLINES[item.type]
    message = EmailMessage()
    message["From"] = config.sender
    message["To"] = item.target
    message["Subject"] = f"Batch {batch.id} {headline}"
    message["Date"] = format_datetime(datetime.fromtimestamp(int(item.created_at), UTC))
    message["Message-ID"] = f"<{item.event_id}@{_domain(config.sender)}>"
    message["Auto-Submitted"] = "auto-generated"
    values = {
        "batch": batch,
        "counts": batch.counts,
        "usage": batch.usage,
        "headline": headline,
        "total": batch.counts.total,
        "times": _times(item, batch),
        "errors": batch.errors[:_LISTED_ERRORS],
        "links": _links(batch, config.public_url),
    }
    message.set_content(_TEMPLATES.get_template("batch.txt").render(values))
    message.add_alternative(_TEMPLATES.get_template("batch.html").render(values), subtype="html")
    return message


@dataclass(frozen=True, slots=True)
class _Server:
    host: str
    port: int
    user: str | None
    password: str | None
    tls: bool


def _server(url: str) -> _Server:
    if not url:
        raise ConfigurationError("E-mail is off: set QLM_SMTP_URL to smtp://host:port.")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("smtp", "smtps") or not parts.hostname:
        raise ConfigurationError("QLM_SMTP_URL must look like smtp://user:password@host:port.")
    tls = parts.scheme == "smtps"
    return _Server(
        host=parts.hostname,
        port=port or (465 if tls else 25),
        user=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
        tls=tls,
    )


async def _send(message: EmailMessage, server: _Server, timeout_s: float) -> None:
    async with asyncio.timeout(timeout_s):
        await aiosmtplib.send(
            message,
            hostname=server.host,
            port=server.port,
            username=server.user,
            password=server.password,
            use_tls=server.tls,
            timeout=timeout_s,
        )


def _domain(sender: str) -> str:
    return parseaddr(sender)[1].rpartition("@")[2] or "localhost"


def _times(item: OutboxItem, batch: Batch) -> list[tuple[str, str]]:
    ended = _ended_at(batch) or item.created_at
    times = [("Submitted", _moment(batch.created_at)), ("Ended", _moment(ended))]
    times.append(("Took", in_words(ended - batch.created_at)))
    times.append(("Deadline", _moment(batch.deadline)))
    return times


def _ended_at(batch: Batch) -> float | None:
    if batch.state not in EVENT_OF:
        return None
    ends = (batch.completed_at, batch.failed_at, batch.expired_at, batch.cancelled_at)
    return max((end for end in ends if end is not None), default=None)


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _links(batch: Batch, public_url: str) -> list[tuple[str, str]]:
    base = f"{public_url.rstrip('/')}/v1"
    links = [("Status", f"{base}/batches/{batch.id}")]
    if batch.output_file_id:
        links.append(("Results", f"{base}/files/{batch.output_file_id}/content"))
    if batch.error_file_id:
        links.append(("Errors", f"{base}/files/{batch.error_file_id}/content"))
    return links
