"""`/v1/models`: what live instances serve now."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path

from qlm_batch.api import render
from qlm_batch.api.auth import Parts, Reader
from qlm_batch.api.responses import errors
from qlm_batch.api.schemas import ModelObject, Page
from qlm_batch.domain.errors import NotFound

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("", operation_id="list_models", responses=errors())
def list_models(parts: Parts, key: Reader) -> Page[ModelObject]:
    """All models, by name."""
    models = render.model_objects(parts.store.instances())
    return Page(
        data=models,
        first_id=models[0].id if models else None,
        last_id=models[-1].id if models else None,
        has_more=False,
    )


@router.get("/{model_id:path}", operation_id="get_model", responses=errors(404))
def get_model(
    model_id: Annotated[str, Path(max_length=512)], parts: Parts, key: Reader
) -> ModelObject:
    """One model; its name may hold slashes."""
    for model in render.model_objects(parts.store.instances()):
        if model.id == model_id:
            return model
    raise NotFound(
        f"The model '{model_id[:100]}' is not served now. GET /v1/models lists those that are.",
        code="model_not_found",
        param="model",
    )
