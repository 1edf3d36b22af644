"""`/v1/webhooks/secret`: what receivers verify signatures with, made here and shown once."""

from __future__ import annotations

from fastapi import APIRouter

from qlm_batch.api.auth import Admin, Parts
from qlm_batch.api.responses import errors
from qlm_batch.api.schemas import WebhookSecret

router = APIRouter(prefix="/v1/webhooks/secret", tags=["webhooks"])


@router.post("/rotate", operation_id="rotate_webhook_secret", responses=errors())
def rotate_secret(parts: Parts, key: Admin) -> WebhookSecret:
    """A fresh secret, shown in this answer and never again; the one before signs for a day more."""
    return WebhookSecret(secret=parts.store.rotate_webhook_secret(key.tenant))
