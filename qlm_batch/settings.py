"""Settings, read once at the start of a process from the environment (`QLM_…`) or arguments."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AliasChoices, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from qlm_batch.domain.errors import ConfigurationError
from qlm_batch.scheduling.eviction import Favour

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def default_data_dir() -> Path:
    """The user's own folder for this service (XDG base directories)."""
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "qlm-batch"


class Settings(BaseSettings):
    """Everything that may be set. Durations are seconds, sizes are bytes."""

    model_config = SettingsConfigDict(
        env_prefix="QLM_", populate_by_name=True, extra="forbid", frozen=True
    )

    database_url: str = Field(
        default="",
        validation_alias=AliasChoices("database_url", "DATABASE_URL", "QLM_DATABASE_URL"),
    )
    redis_url: str = Field(
        default="", validation_alias=AliasChoices("redis_url", "REDIS_URL", "QLM_REDIS_URL")
    )
    data_dir: Path = Field(default_factory=default_data_dir)
    blob_url: str = ""
    """An fsspec URL (`s3://bucket/prefix`); empty keeps blobs in `data_dir`."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_json: bool = False

    host: str = "127.0.0.1"
    port: int = Field(default=8600, ge=0, le=65535)
    public_url: str = ""
    """Base of the links in e-mails; empty means http://host:port."""
    max_file_bytes: Count = 8 * 1024**3
    max_line_bytes: Count = 1024**2
    """Longest line of a file. A worker holds several for each of its slots, so a larger bound
    costs memory there."""
    max_lines: Count = 5_000_000
    max_json_depth: Count = 64
    max_n: Count = 16
    batch_rows_s: Annotated[float, Field(gt=0)] = 30 * 86_400.0
    """How long a batch is kept after its end, with its lines, results, decisions and deliveries.
    Files stay until they expire or are deleted. `inf` keeps everything."""

    slice_requests: Count = 64
    lease_s: Seconds = 30.0
    leader_term_s: Seconds = 10.0
    tick_s: Seconds = 0.5
    instance_silent_s: Seconds = 15.0
    flush_s: Seconds = 0.05
    flush_rows: Count = 256
    poll_s: Seconds = 1.5
    heartbeat_s: Seconds = 2.0
    policy: str = "qlm"
    record: Path | None = None
    """File to which the scheduler appends what it saw and planned, for `qlm simulate --replay`;
    compressed where it ends in `.gz`. It grows by some megabytes an hour."""

    interactive_ttft_s: Seconds = 2.0
    """Target for the first token where neither the request nor its key names one."""
    interactive_tpot_s: Seconds = 0.1
    """Target for each further token; while steps take longer, batch work is held back."""
    interactive_open: Count = 1000
    """Most interactive requests under way in one API process."""
    interactive_body_bytes: Count = 16 * 1024**2
    """Largest body of an interactive request; images come inside it."""
    interactive_bodies_s: float = 86_400.0
    """How long bodies and answers of interactive requests are kept after their end."""
    interactive_rows_s: float = 30 * 86_400.0
    """How long it is kept that there was a request, with its timings and token counts."""

    instance: str = "gpu-0"
    """This worker's stable name."""
    engine: Literal["vllm", "openai", "simulated"] = "vllm"
    engine_url: str = ""
    engine_api_key: str = ""
    models: tuple[str, ...] = ()
    """Hugging Face ids or folders this worker hosts; `embed:NAME` for an embedding model."""
    lora: tuple[str, ...] = ()
    """LoRA adapters: `NAME=FOLDER` of the first generating model, or `BASE:NAME=FOLDER`."""
    models_awake: Count | None = None
    """Most models awake at once; the others wait asleep or unloaded. None: as many as fit."""
    swap_timeout_s: Seconds = 300.0
    """An engine that takes longer to sleep or wake is ended and started anew."""
    sleep_level: Literal[1, 2] = 1
    """Where weights wait on a GPU's host: 1 keeps them in its memory, 2 reads them again."""
    slots: Count = 32
    max_num_batched_tokens: Count = 2048
    max_model_len: Count | None = None
    kv_cache_bytes: Count | None = None
    dtype: str = "auto"
    enforce_eager: bool = False
    favour: Favour = "balanced"
    """What engines favour where batch throughput and interactive latency are at odds."""
    tool_parser: str = ""
    """How the models write tool calls: one of vLLM's parsers, as `hermes` or `llama3_json`. Without
    it requests whose tools may be called are refused."""
    engine_args: dict[str, object] = Field(default_factory=dict)
    """Further vLLM engine arguments, as JSON."""
    simulated_time_scale: float = 1.0
    """Speed of the simulated engine: 0 answers at once, 1 in the modelled time."""
    start_timeout_s: Seconds = 900.0
    stall_s: Seconds = 120.0
    """An engine with work in flight and no step for this long is taken for hung."""

    smtp_url: str = ""
    """`smtp://user:password@host:port`, `smtps://…`; empty turns e-mail off.

    Read by the callbacks, which send it, and by the API, which refuses addresses without it.
    """
    email_from: str = "qlm-batch@localhost"
    email_allow: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Addresses and `@domain`s each tenant may announce to, as JSON; `*` is for tenants not named,
    and without it those may announce to anyone."""
    webhook_allow: tuple[str, ...] = ()
    """Hosts or CIDR ranges allowed as webhook targets although they are not public."""
    webhook_timeout_s: Seconds = 20.0
    secret_key: str = ""
    """Encrypts webhook secrets at rest; empty reads or makes `data_dir/secret.key` (0600)."""

    @property
    def swaps(self) -> bool:
        """Whether models take turns."""
        return self.models_awake is not None and self.models_awake < len(self.models)


def load_settings(**given: object) -> Settings:
    """Settings from the environment with `given` on top.

    Raises ConfigurationError that names each setting that cannot be used, and why.
    """
    try:
        return Settings(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()
        )
    except SettingsError as error:
        faults = f"{error}; lists and objects are given as JSON"
    raise ConfigurationError(f"the settings cannot be used: {faults}")
