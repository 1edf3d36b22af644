"""Queries behind the fleet: reports of life, departures, and who is there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy.engine import Connection

from qlm_batch.domain.buckets import PromptMix
from qlm_batch.domain.jobs import EngineKind, SloClass
from qlm_batch.domain.records import Heartbeat
from qlm_batch.domain.snapshot import (
    AssignedView,
    InstanceState,
    InstanceView,
    Latency,
    ModelView,
    Residency,
)
from qlm_batch.domain.transitions import SUSPECT_AFTER
from qlm_batch.store.loss import lose_all, requeue
from qlm_batch.store.planning import add_observations
from qlm_batch.store.sql import sql

UNKNOWN_LENGTH = 4096
"""Tokens assumed for an unbounded request while no instance has told its model's limit."""

_REMEMBERED_BOOTS = 32
_FORGOTTEN_AFTER_S = 3600.0

_LOCK = sql("SELECT boot_id, past_boots, retired_at FROM instance WHERE name = :name FOR UPDATE")
_SAVE = sql(
    """
    INSERT INTO instance (name, boot_id, past_boots, device, state, models, slots, kv_tokens,
        running, interactive_running, batch_cap, evictions, recomputed_tokens, output_tokens,
        kv_usage, latencies, generated, tokens_per_s, interactive_share, phase, beat_at)
    VALUES (:name, :boot_id, CAST(:past_boots AS text[]), :device, :state,
        CAST(:models AS jsonb), :slots, :kv_tokens, :running, :interactive_running,
        :batch_cap, :evictions, :recomputed_tokens, :output_tokens, :kv_usage,
        CAST(:latencies AS jsonb), CAST(:generated AS integer[]), :tokens_per_s,
        :interactive_share, :phase, {now})
    ON CONFLICT (name) DO UPDATE
    SET boot_id = excluded.boot_id, past_boots = excluded.past_boots, device = excluded.device,
        state = excluded.state, models = excluded.models, slots = excluded.slots,
        kv_tokens = excluded.kv_tokens, running = excluded.running,
        interactive_running = excluded.interactive_running, batch_cap = excluded.batch_cap,
        evictions = excluded.evictions, recomputed_tokens = excluded.recomputed_tokens,
        output_tokens = excluded.output_tokens, kv_usage = excluded.kv_usage,
        latencies = excluded.latencies, generated = excluded.generated,
        tokens_per_s = excluded.tokens_per_s, interactive_share = excluded.interactive_share,
        phase = excluded.phase, beat_at = excluded.beat_at,
        retired_at = NULL
    """
)
_ASSIGNED = sql(
    "SELECT id FROM slice WHERE instance = :name AND state = 'assigned' ORDER BY id FOR UPDATE"
)
_LEASED = sql("SELECT id FROM slice WHERE instance = :name AND state = 'leased' ORDER BY id")
_LEASED_LOCKED = sql(
    "SELECT id FROM slice WHERE instance = :name AND state = 'leased' ORDER BY id FOR UPDATE"
)


def heartbeat(connection: Connection, beat: Heartbeat) -> bool:
    """Report life; False for a boot that was replaced or has retired.

    A name's next boot takes it over: what the boot before it leased counts as lost with it.
    """
    row = connection.execute(_LOCK, {"name": beat.name}).one_or_none()
    past = [] if row is None else list(row.past_boots)
    if beat.boot_id in past:
        return False
    if row is not None and row.boot_id != beat.boot_id:
        past = [*past, row.boot_id][-_REMEMBERED_BOOTS:]
        _take_back(connection, beat.name, "replaced")
    connection.execute(
        _SAVE,
        {
            "name": beat.name,
            "boot_id": beat.boot_id,
            "past_boots": past,
            "device": beat.device,
            "state": beat.state.value,
            "models": json.dumps([asdict(model) for model in beat.models]),
            "slots": beat.slots,
            "kv_tokens": beat.kv_tokens,
            "running": beat.running,
            "interactive_running": beat.interactive_running,
            "batch_cap": beat.batch_cap,
            "evictions": beat.evictions,
            "recomputed_tokens": beat.recomputed_tokens,
            "output_tokens": beat.output_tokens,
            "kv_usage": beat.kv_usage,
            "latencies": json.dumps([asdict(latency) for latency in beat.latencies]),
            "generated": list(beat.generated),
            "tokens_per_s": beat.tokens_per_s,
            "interactive_share": beat.interactive_share,
            "phase": beat.phase,
        },
    )
    add_observations(connection, beat.observations)
    return True


def _take_back(connection: Connection, name: str, reason: str) -> None:
    """Queue again what a dead boot was given; an attempt counts where it was leased."""
    leased = connection.scalars(_LEASED, {"name": name}).all()
    if leased:
        lose_all(connection, leased, reason, name)
    requeue(connection, connection.scalars(_ASSIGNED, {"name": name}).all())


_DIED = sql(
    """
    UPDATE instance SET state = 'lost', past_boots = past_boots || CAST(:boot_id AS text)
    WHERE name = :name
    """
)


def died(connection: Connection, name: str, boot_id: str) -> None:
    """Show a dead boot as lost until the next of its name, and take back what it was given."""
    row = connection.execute(_LOCK, {"name": name}).one_or_none()
    if row is None or row.boot_id != boot_id or boot_id in row.past_boots:
        return
    _take_back(connection, name, "killed")
    connection.execute(_DIED, {"name": name, "boot_id": boot_id})


_RETIRE = sql(
    """
    UPDATE instance SET retired_at = {now}, past_boots = past_boots || CAST(:boot_id AS text)
    WHERE name = :name AND boot_id = :boot_id AND retired_at IS NULL
    """
)


def retire(connection: Connection, name: str, boot_id: str) -> None:
    """Leave in good order: what is left is queued again, and no attempt is counted."""
    row = connection.execute(_LOCK, {"name": name}).one_or_none()
    if row is None or row.boot_id != boot_id or row.retired_at is not None:
        return
    for held in (_ASSIGNED, _LEASED_LOCKED):
        requeue(connection, connection.scalars(held, {"name": name}).all())
    connection.execute(_RETIRE, {"name": name, "boot_id": boot_id})


_INSTANCES = sql(
    """
    SELECT i.*, i.beat_at < {now} - :silent_s AS silent FROM instance i
    WHERE i.retired_at IS NULL AND i.beat_at > {now} - :forgotten_s
    ORDER BY i.name
    """
)
_HELD = sql(
    """
    SELECT s.instance, s.run_id, s.generation, s.batch_id, u.tenant, u.model, u.kind,
           u.prompts, min(s.deadline) AS deadline, count(*) AS slices,
           count(*) FILTER (WHERE s.state = 'leased') AS leased_slices,
           count(*) FILTER (WHERE s.attempts >= :suspect) AS suspect_slices,
           sum(s.remaining)::bigint AS requests, sum(s.prompt_tokens)::bigint AS prompt_tokens,
           sum(s.max_tokens)::bigint AS max_tokens, sum(s.unbounded)::bigint AS unbounded
    FROM slice s JOIN run u ON u.id = s.run_id
    WHERE s.state IN ('assigned', 'leased')
    GROUP BY s.instance, s.run_id, s.generation, s.batch_id, u.tenant, u.model, u.kind,
             u.prompts
    ORDER BY s.instance, min(s.deadline), s.run_id, s.generation
    """
)


def instances(connection: Connection, silent_s: float) -> Sequence[InstanceView]:
    """Instances seen within the hour, with what they were given; silent ones are lost."""
    rows = connection.execute(
        _INSTANCES, {"silent_s": silent_s, "forgotten_s": max(_FORGOTTEN_AFTER_S, 2 * silent_s)}
    ).all()
    models = {row.name: _to_models(row.models) for row in rows}
    limits = lengths([model for hosted in models.values() for model in hosted])
    held: dict[str, list[Any]] = {}
    for row in connection.execute(_HELD, {"suspect": SUSPECT_AFTER}):
        held.setdefault(row.instance, []).append(row)
    return [_to_view(row, models[row.name], held.get(row.name, []), limits) for row in rows]


_SERVED = sql(
    """
    SELECT EXISTS (SELECT FROM instance i
                   WHERE i.beat_at > {now} - :within_s
                     AND i.models @> CAST(:hosts AS jsonb))
    """
)


def served_lately(connection: Connection, model: str, within_s: float) -> bool:
    """Whether an instance with this model, retired or not, reported within `within_s`."""
    if "\0" in model:
        # No name in the database can hold one, nor can a question about it.
        return False
    hosts = json.dumps([{"name": model}])
    return bool(connection.scalar(_SERVED, {"hosts": hosts, "within_s": within_s}))


def lengths(models: Sequence[ModelView]) -> dict[str, int]:
    """The longest context of each model that has told it."""
    known: dict[str, int] = {}
    for model in models:
        if model.max_model_len:
            known[model.name] = max(known.get(model.name, 0), model.max_model_len)
    return known


def most_tokens(row: Any, limits: dict[str, int]) -> int:
    """Upper bound of the tokens a sum of slices may generate; an embedding generates none."""
    if row.kind == EngineKind.EMBED.value:
        return 0
    return int(row.max_tokens + row.unbounded * limits.get(row.model, UNKNOWN_LENGTH))


def to_prompts(flat: Sequence[int]) -> PromptMix:
    """The mix of prompts a run was stored with: bucket and count in turn."""
    return tuple(zip(flat[::2], flat[1::2], strict=True))


def _to_models(hosted: Sequence[dict[str, Any]]) -> tuple[ModelView, ...]:
    return tuple(
        ModelView(
            name=model["name"],
            kind=EngineKind(model["kind"]),
            residency=Residency(model["residency"]),
            max_model_len=model["max_model_len"],
            wake_s=model["wake_s"],
            swaps=model.get("swaps", 0),
            swap_s=model.get("swap_s", 0.0),
            stay_s=model.get("stay_s", 0.0),
            parent=model.get("parent", ""),
            fault=model.get("fault", ""),
        )
        for model in hosted
    )


def _to_view(
    row: Any, models: tuple[ModelView, ...], held: Sequence[Any], limits: dict[str, int]
) -> InstanceView:
    return InstanceView(
        name=row.name,
        boot_id=row.boot_id,
        device=row.device,
        state=InstanceState.LOST if row.silent else InstanceState(row.state),
        models=models,
        slots=row.slots,
        kv_tokens=row.kv_tokens,
        running=row.running,
        interactive_running=row.interactive_running,
        batch_cap=row.batch_cap,
        evictions=row.evictions,
        recomputed_tokens=row.recomputed_tokens,
        output_tokens=row.output_tokens,
        kv_usage=row.kv_usage,
        latencies=tuple(
            Latency(**told | {"slo_class": SloClass(told["slo_class"])}) for told in row.latencies
        ),
        generated=tuple(row.generated),
        assigned=tuple(
            AssignedView(
                run_id=work.run_id,
                generation=work.generation,
                batch_id=work.batch_id,
                tenant=work.tenant,
                model=work.model,
                deadline=work.deadline,
                slices=work.slices,
                leased_slices=work.leased_slices,
                requests=work.requests,
                prompt_tokens=work.prompt_tokens,
                max_tokens=most_tokens(work, limits),
                prompts=to_prompts(work.prompts),
            )
            for work in held
        ),
        suspect_slices=sum(work.suspect_slices for work in held),
        tokens_per_s=row.tokens_per_s,
        interactive_share=row.interactive_share,
    )
