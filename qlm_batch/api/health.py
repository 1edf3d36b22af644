"""`/healthz`, `/readyz` and `/metrics`: no key needed, nothing about tenants told."""

from __future__ import annotations

import os

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from qlm_batch.api.auth import Parts
from qlm_batch.api.errors import RETRY_AFTER_S
from qlm_batch.api.metrics import Metrics
from qlm_batch.api.schemas import Health, NotReady
from qlm_batch.api.services import ApiServices
from qlm_batch.api.uploads import spool_dir
from qlm_batch.domain.errors import Unavailable

router = APIRouter(tags=["health"])


@router.get("/healthz", operation_id="health")
async def healthz() -> Health:
    """The process answers."""
    return Health()


@router.get(
    "/readyz", operation_id="ready", response_model=Health, responses={503: {"model": NotReady}}
)
def readyz(parts: Parts) -> Response:
    """Whether uploads and batches are taken now, and if not, why."""
    reasons = _reasons(parts)
    if not reasons:
        return JSONResponse(Health().model_dump())
    error = Unavailable("Not ready: " + " ".join(reasons))
    return JSONResponse(
        {"status": "unavailable", "reasons": reasons, "error": dict(error.body())},
        status_code=error.status,
        headers={"retry-after": str(round(RETRY_AFTER_S))},
    )


@router.get("/metrics", operation_id="metrics", response_class=PlainTextResponse)
def metrics(request: Request) -> Response:
    """Metrics in Prometheus' text format."""
    collected: Metrics = request.app.state.metrics
    return Response(collected.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _reasons(parts: ApiServices) -> list[str]:
    reasons = []
    try:
        parts.store.ping()
    except Unavailable as error:
        reasons.append(error.message)
    folder = spool_dir(parts)
    if not os.access(folder, os.W_OK | os.X_OK):
        reasons.append("The folder for uploads cannot be written; check the data folder.")
    return reasons
