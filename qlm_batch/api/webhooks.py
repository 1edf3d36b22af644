"""`/v1/webhooks/secret`: what receivers verify signatures with."""

from __future__ import annotations

from fastapi import APIRouter

from qlm_batch.api.auth import Admin, Parts
from qlm_batch.api.responses import errors
from qlm_batch.api.schemas import WebhookSecret

router = APIRouter(prefix="/v1/webhooks/secret", tags=["webhooks"])


@router.get("", operation_id="get_webhook_secret", responses=errors())
def get_secret(parts: Parts, key: Admin) -> WebhookSecret:
    """The secret that signs the tenant's webhooks; the first call makes one."""
    return WebhookSecret(secret=parts.store.webhook_secrets(key.tenant)[0])


@router.post("/rotate", operation_id="rotate_webhook_secret", responses=errors())
def rotate_secret(parts: Parts, key: Admin) -> WebhookSecret:
    """A fresh secret; the one before signs along for a day."""
    return WebhookSecret(secret=parts.store.rotate_webhook_secret(key.tenant))
