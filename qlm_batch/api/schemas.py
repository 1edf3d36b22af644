"""The shapes of requests and responses, as the OpenAPI document shows them.

Fields that may be null are always there. Times are whole seconds since the Unix epoch.
"""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Item = TypeVar("Item")


def _storable(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not contain NUL characters")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("must not contain half of a surrogate pair")
    return text


Text = Annotated[str, AfterValidator(_storable)]


class ErrorDetail(BaseModel):
    """What went wrong and how to mend it."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(BaseModel):
    """The body of every error."""

    error: ErrorDetail


class FileObject(BaseModel):
    """A file of the caller's."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"] = "processed"
    status_details: str | None = None


class FileDeleted(BaseModel):
    """The answer to a deletion."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class Page(BaseModel, Generic[Item]):
    """One page of a list; send `last_id` as `after` for the next."""

    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool


class BatchError(BaseModel):
    """Why validation refused a file; `line` is 1-based."""

    code: str
    message: str
    param: str | None
    line: int | None


class BatchErrors(BaseModel):
    """The first errors found in a file."""

    object: Literal["list"] = "list"
    data: list[BatchError]


class Counts(BaseModel):
    """Lines by outcome."""

    total: int
    completed: int
    failed: int


class InputTokens(BaseModel):
    """Input tokens in detail."""

    cached_tokens: int


class OutputTokens(BaseModel):
    """Output tokens in detail."""

    reasoning_tokens: int


class BatchUsage(BaseModel):
    """Tokens as the engine counted them."""

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    output_tokens_details: OutputTokens
    total_tokens: int


class Eta(BaseModel):
    """When the batch will be done, with a chance of one half and of 95 %; null where not known."""

    p50: int | None
    p95: int | None


class PromiseObject(BaseModel):
    """The estimate shown at acceptance."""

    p50: int | None
    p95: int | None
    reason: str
    made_at: int


class CallbacksObject(BaseModel):
    """Where completion is announced."""

    webhook: str | None
    email: str | None


class BatchExtras(BaseModel):
    """What this service tells beyond OpenAI's contract."""

    deadline: int
    eta: Eta
    miss_probability: float | None
    reason: str | None
    promise: PromiseObject | None
    generation: int
    on_miss: Literal["expire", "finish_late"]
    strict: bool
    callbacks: CallbacksObject
    models: list[str]
    error_count: int


class BatchObject(BaseModel):
    """A batch of the caller's."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating",
        "failed",
        "in_progress",
        "finalizing",
        "completed",
        "expired",
        "cancelling",
        "cancelled",
    ]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: Counts
    usage: BatchUsage
    metadata: dict[str, str] | None
    qlm: BatchExtras


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class CallbacksIn(_Request):
    """Where to announce completion."""

    webhook: Annotated[Text, Field(min_length=1, max_length=2048)] | None = None
    email: Annotated[Text, Field(min_length=3, max_length=254)] | None = None


class OutputExpiry(_Request):
    """When the output files are removed, counted from their creation."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2592000)]


MetadataKey = Annotated[Text, Field(max_length=64)]
MetadataValue = Annotated[Text, Field(max_length=512)]


class BatchCreate(_Request):
    """A file to run."""

    input_file_id: Annotated[Text, Field(min_length=1, max_length=128)]
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
    completion_window: Annotated[
        Text,
        Field(
            min_length=2,
            max_length=64,
            description="Any duration from 10s to 30d: 15m, 2h30m, 24h, 7d.",
        ),
    ]
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    output_expires_after: OutputExpiry | None = None
    callbacks: CallbacksIn | None = None
    on_miss: Literal["expire", "finish_late"] = "expire"
    strict: bool = False


class BatchRetry(_Request):
    """How long the retry may take; the batch's own window when absent."""

    completion_window: Annotated[Text, Field(min_length=2, max_length=64)] | None = None


class DeliveryObject(BaseModel):
    """One attempt to deliver a completion event."""

    object: Literal["batch.delivery"] = "batch.delivery"
    event_id: str
    event_type: str
    event_created_at: int
    generation: int
    channel: str
    target: str
    ok: bool
    status_code: int | None
    detail: str
    at: float | None
    duration_ms: int
    retry_at: int | None


class ReplayObject(BaseModel):
    """How many dead deliveries were made due again."""

    object: Literal["batch.replay"] = "batch.replay"
    replayed: int


class DecisionObject(BaseModel):
    """One thing the scheduler did with the batch, and why."""

    object: Literal["batch.decision"] = "batch.decision"
    kind: str
    at: float
    group: str | None
    instance: str | None
    detail: dict[str, Any]


class ModelExtras(BaseModel):
    """Where a model is served."""

    kind: Literal["generate", "embed"]
    max_model_len: int
    instances: list[str]


class ModelObject(BaseModel):
    """A model that a live instance hosts; `created` is 0, as nobody records it.

    `parent` is the base model of an adapter.
    """

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "qlm-batch"
    parent: str | None = None
    qlm: ModelExtras


class WebhookSecret(BaseModel):
    """What receivers verify signatures with."""

    object: Literal["webhook_secret"] = "webhook_secret"
    secret: str


class Health(BaseModel):
    """The process is up."""

    status: Literal["ok"] = "ok"


class NotReady(BaseModel):
    """What keeps the service from taking work."""

    status: Literal["unavailable"] = "unavailable"
    reasons: list[str]
    error: ErrorDetail
