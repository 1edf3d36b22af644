"""From domain objects to the shapes clients see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from pydantic import BaseModel

from qlm_batch.api import schemas
from qlm_batch.domain import records
from qlm_batch.domain.jobs import Batch, DeliveryAttempt, FileRecord, OutboxItem
from qlm_batch.domain.snapshot import Decision, InstanceState, InstanceView
from qlm_batch.domain.transitions import TERMINAL

Domain = TypeVar("Domain")
Shape = TypeVar("Shape", schemas.FileObject, schemas.BatchObject)
AnyShape = TypeVar("AnyShape", bound=BaseModel)


def file_object(record: FileRecord) -> schemas.FileObject:
    """A file as OpenAI shows it."""
    return schemas.FileObject(
        id=record.id,
        bytes=record.bytes,
        created_at=int(record.created_at),
        expires_at=_second(record.expires_at),
        filename=record.filename,
        purpose=record.purpose.value,
    )


def batch_object(batch: Batch) -> schemas.BatchObject:
    """A batch as OpenAI shows it, and what this service adds."""
    return schemas.BatchObject(
        id=batch.id,
        endpoint=batch.spec.endpoint,
        model=batch.models[0] if len(batch.models) == 1 else None,
        errors=_errors(batch),
        input_file_id=batch.spec.input_file_id,
        completion_window=batch.spec.completion_window,
        status=batch.state.value,
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        created_at=int(batch.created_at),
        in_progress_at=_second(batch.in_progress_at),
        expires_at=int(batch.deadline),
        finalizing_at=_second(batch.finalizing_at),
        completed_at=_second(batch.completed_at),
        failed_at=_second(batch.failed_at),
        expired_at=_second(batch.expired_at),
        cancelling_at=_second(batch.cancelling_at),
        cancelled_at=_second(batch.cancelled_at),
        request_counts=schemas.Counts(
            total=batch.counts.total,
            completed=batch.counts.completed,
            failed=batch.counts.failed,
        ),
        usage=_usage(batch),
        metadata=None if batch.spec.metadata is None else dict(batch.spec.metadata),
        qlm=_extras(batch),
    )


def page(items: records.Page[Domain], shape: Callable[[Domain], Shape]) -> schemas.Page[Shape]:
    """One page of objects that have ids."""
    data = [shape(item) for item in items.items]
    return schemas.Page(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=items.has_more,
    )


def whole(data: Sequence[AnyShape]) -> schemas.Page[AnyShape]:
    """A complete list of objects that have no ids."""
    return schemas.Page(data=list(data), first_id=None, last_id=None, has_more=False)


def delivery_object(item: OutboxItem, attempt: DeliveryAttempt) -> schemas.DeliveryObject:
    """One attempt and the event it was for."""
    return schemas.DeliveryObject(
        event_id=item.event_id,
        event_type=item.type,
        event_created_at=int(item.created_at),
        generation=item.generation,
        channel=item.channel,
        target=item.target,
        ok=attempt.ok,
        status_code=attempt.status_code,
        detail=attempt.detail,
        at=attempt.at,
        duration_ms=round(attempt.duration_s * 1000),
        retry_at=_second(attempt.retry_at),
    )


def decision_object(decision: Decision) -> schemas.DecisionObject:
    """One line of a batch's story."""
    return schemas.DecisionObject(
        kind=decision.kind,
        at=decision.at,
        group=decision.group_key,
        instance=decision.instance,
        detail=dict(decision.detail),
    )


def model_objects(instances: Sequence[InstanceView]) -> list[schemas.ModelObject]:
    """The models of instances that are up, by name."""
    served: dict[str, schemas.ModelObject] = {}
    for instance in instances:
        if instance.state in (InstanceState.STARTING, InstanceState.LOST):
            continue
        for model in instance.models:
            known = served.get(model.name)
            if known is None:
                extras = schemas.ModelExtras(
                    kind=model.kind.value, max_model_len=model.max_model_len, instances=[]
                )
                known = served[model.name] = schemas.ModelObject(
                    id=model.name, parent=model.parent or None, qlm=extras
                )
            known.qlm.instances.append(instance.name)
            lengths = (known.qlm.max_model_len, model.max_model_len)
            # 0 where the model was not loaded yet.
            known.qlm.max_model_len = min(filter(None, lengths), default=0)
    return [served[name] for name in sorted(served)]


def _errors(batch: Batch) -> schemas.BatchErrors | None:
    if not batch.errors:
        return None
    return schemas.BatchErrors(
        data=[
            schemas.BatchError(
                code=error.code, message=error.message, param=error.param, line=error.line
            )
            for error in batch.errors
        ]
    )


def _usage(batch: Batch) -> schemas.BatchUsage:
    usage = batch.usage
    return schemas.BatchUsage(
        input_tokens=usage.input_tokens,
        input_tokens_details=schemas.InputTokens(cached_tokens=usage.cached_tokens),
        output_tokens=usage.output_tokens,
        output_tokens_details=schemas.OutputTokens(reasoning_tokens=usage.reasoning_tokens),
        total_tokens=usage.total_tokens,
    )


def _extras(batch: Batch) -> schemas.BatchExtras:
    # An estimate of the future says nothing about a batch that has ended.
    estimate = None if batch.state in TERMINAL else batch.estimate
    promise = batch.promise
    on_miss: Literal["expire", "finish_late"] = batch.spec.on_miss.value
    return schemas.BatchExtras(
        deadline=int(batch.deadline),
        eta=schemas.Eta(
            p50=_second(estimate.p50) if estimate else None,
            p95=_second(estimate.p95) if estimate else None,
        ),
        miss_probability=estimate.miss_probability if estimate else None,
        reason=estimate.reason if estimate else None,
        promise=None
        if promise is None
        else schemas.PromiseObject(
            p50=_second(promise.p50),
            p95=_second(promise.p95),
            reason=promise.reason,
            made_at=int(promise.made_at),
        ),
        generation=batch.generation,
        on_miss=on_miss,
        strict=batch.spec.strict,
        callbacks=schemas.CallbacksObject(
            webhook=batch.spec.callbacks.webhook, email=batch.spec.callbacks.email
        ),
        models=list(batch.models),
        error_count=batch.error_count,
    )


def _second(at: float | None) -> int | None:
    return None if at is None else int(at)
