"""Where a batch may announce its completion, checked when it is created."""

from __future__ import annotations

from email.errors import HeaderParseError
from email.headerregistry import Address

from qlm_batch.api.schemas import CallbacksIn
from qlm_batch.callbacks.targets import check_webhook_url
from qlm_batch.domain.errors import InvalidInput
from qlm_batch.domain.jobs import Callbacks
from qlm_batch.settings import Settings

_EMAIL = "callbacks.email"


def checked_callbacks(asked: CallbacksIn | None, tenant: str, settings: Settings) -> Callbacks:
    """The callbacks as asked, if both may be used. InvalidInput names the one that may not."""
    if asked is None:
        return Callbacks()
    if asked.webhook is not None:
        check_webhook_url(asked.webhook, settings.webhook_allow)
    if asked.email is not None:
        check_email(asked.email, tenant, settings)
    return Callbacks(webhook=asked.webhook, email=asked.email)


def check_email(address: str, tenant: str, settings: Settings) -> None:
    """Refuse what is not one plain address, or lies outside the tenant's allow-list, or all of it.

    Mail is sent by `qlm callbacks`, which runs on the same settings as the API.
    """
    if not _well_formed(address):
        raise InvalidInput(
            f"'{_EMAIL}' must be one plain address like name@example.org.",
            code="invalid_email",
            param=_EMAIL,
        )
    if not settings.smtp_url:
        raise InvalidInput(
            f"'{_EMAIL}': this service sends no e-mail. Use a webhook, or have QLM_SMTP_URL set "
            "for the API and the callbacks.",
            code="email_off",
            param=_EMAIL,
        )
    allowed = settings.email_allow.get(tenant, settings.email_allow.get("*"))
    if allowed is None:
        return
    plain = address.lower()
    domain = plain[plain.rindex("@") :]
    if not {plain, domain} & {entry.lower() for entry in allowed}:
        raise InvalidInput(
            f"'{_EMAIL}': {address} is not among the addresses this tenant may announce to. "
            "Use one of them, or have it added to QLM_EMAIL_ALLOW.",
            code="email_not_allowed",
            param=_EMAIL,
        )


def _well_formed(address: str) -> bool:
    if not address.isprintable() or any(mark in address for mark in ' ,;<>()"\\'):
        return False
    try:
        parsed = Address(addr_spec=address)
    except (ValueError, IndexError, HeaderParseError):
        return False
    return bool(parsed.username and parsed.domain) and not parsed.domain.startswith("[")
