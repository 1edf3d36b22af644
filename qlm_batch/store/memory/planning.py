"""The scheduler's side of the in-memory store: snapshots, plans and dispatch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain

from qlm_batch.domain.jobs import BatchState, EngineKind, Promise, ResultRow, SliceState, SloClass
from qlm_batch.domain.snapshot import (
    AssignedView,
    Assignment,
    Decision,
    InstanceState,
    InstanceView,
    Observation,
    Plan,
    Profile,
    QueueEntry,
    RunView,
    Snapshot,
)
from qlm_batch.ids import new_id
from qlm_batch.store.memory.leadership import check_leader
from qlm_batch.store.memory.state import Facet, Part, RunData, State, Tally, change, locked
from qlm_batch.store.memory.work import left, move, requeue, store_row, take_queued

UNKNOWN_LENGTH = 4096
"""Tokens assumed for an unbounded request while no instance has told its model's limit."""

_FORGOTTEN_AFTER_S = 3600.0
_ESTIMATED = frozenset({BatchState.IN_PROGRESS, BatchState.FINALIZING})


class MemoryPlanning(Facet):
    """Planning in memory, but for leadership."""

    @locked
    def snapshot(self) -> Snapshot:
        """Queue and fleet as of one moment."""
        state = self.state
        limits = _model_limits(state)
        return Snapshot(
            now=state.clock(),
            runs=tuple(_run_view(state, part, limits) for part in sorted(state.queued)),
            instances=instance_views(state),
            queues=tuple(state.queue),
            profiles=tuple(state.profiles[key] for key in sorted(state.profiles)),
            unpromised=frozenset(
                batch_id
                for batch_id, batch in state.unfinished.items()
                if batch.view.state is BatchState.IN_PROGRESS and batch.view.promise is None
            ),
            finishing=frozenset(
                batch_id
                for batch_id, batch in state.unfinished.items()
                if batch.view.state is BatchState.FINALIZING
            ),
        )

    @locked
    def save_plan(self, epoch: int, plan: Plan, decisions: Sequence[Decision]) -> None:
        """Replace the saved virtual queues; keep estimates, first promises and decisions."""
        check_leader(self.state, epoch)
        self.state.queue = [
            QueueEntry(queue.instance, position, p.group.key, p.group.slices, p.reason)
            for queue in sorted(plan.queues, key=lambda queue: queue.instance)
            for position, p in enumerate(queue.groups)
        ]
        for batch_id, estimate in plan.estimates.items():
            batch = self.state.batches.get(batch_id)
            if batch is None or batch.view.state not in _ESTIMATED:
                continue
            batch.estimate = estimate
            promised = batch.view.promise is not None or estimate.p50 is None
            if not promised and batch.view.state is BatchState.IN_PROGRESS:
                promise = Promise(
                    estimate.p50, estimate.p95, estimate.reason, plan.estimator, estimate.made_at
                )
                change(batch, promise=promise)
        for decision in decisions:
            self.state.decisions[decision.batch_id].append(decision)

    @locked
    def keep_forecasts(self, epoch: int, forecasts: Mapping[str, Mapping[str, object]]) -> None:
        """Keep what was foreseen of batches as they were promised."""
        check_leader(self.state, epoch)
        for batch_id, forecast in forecasts.items():
            batch = self.state.batches.get(batch_id)
            if batch is not None and batch.estimate is not None:
                batch.forecast = forecast

    @locked
    def forecasts(self) -> Mapping[str, Mapping[str, object]]:
        """What was kept of batches that have not ended."""
        return {
            batch_id: batch.forecast
            for batch_id, batch in self.state.unfinished.items()
            if batch.forecast is not None and batch.view.state in _ESTIMATED
        }

    @locked
    def assign(self, epoch: int, assignments: Sequence[Assignment]) -> Mapping[str, int]:
        """Turn queued slices into assigned ones, in order."""
        check_leader(self.state, epoch)
        placed: Counter[str] = Counter()
        for wanted in assignments:
            instance = self.state.instances.get(wanted.instance)
            if instance is None or instance.gone:
                continue
            for _ in range(wanted.slices):
                part = take_queued(self.state, (wanted.run_id, wanted.generation))
                if part is None:
                    break
                part.place = self.state.next("place")
                move(self.state, part, SliceState.ASSIGNED, instance=wanted.instance)
                placed[wanted.instance] += 1
        return placed

    @locked
    def unassign(self, epoch: int, instance: str) -> int:
        """Take back what an instance was assigned but has not claimed."""
        check_leader(self.state, epoch)
        parts = list(self.state.assigned[instance].values())
        for part in parts:
            requeue(self.state, part)
        return len(parts)

    @locked
    def take_observations(self, epoch: int, limit: int = 1000) -> Sequence[Observation]:
        """Remove and return reports not yet folded in, oldest first."""
        check_leader(self.state, epoch)
        waiting = self.state.observations
        return tuple(waiting.popleft() for _ in range(min(limit, len(waiting))))

    @locked
    def save_profiles(self, epoch: int, profiles: Sequence[Profile]) -> None:
        """Remember what was learned."""
        check_leader(self.state, epoch)
        for profile in profiles:
            self.state.profiles[profile.model, profile.device] = profile

    @locked
    def fail_unservable(self, epoch: int, model: str, message: str, *, limit: int = 256) -> int:
        """Fail queued work of a model that nobody serves."""
        check_leader(self.state, epoch)
        error = {
            "message": message,
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
        keys = [key for key in self.state.queued if self.state.runs[key[0]].model == model]
        ids = chain.from_iterable((entry[1] for entry in self.state.waiting[key]) for key in keys)
        queued = (self.state.slices[i] for i in sorted(set(ids)))
        parts = [part for part in queued if part.state is SliceState.QUEUED][:limit]
        for part in parts:
            for position in left(part):
                row = ResultRow(
                    slice_id=part.id,
                    epoch=part.epoch,
                    run_id=part.run.id,
                    position=position,
                    generation=part.generation,
                    request_id=new_id("req_"),
                    status_code=404,
                    body=json.dumps({"error": error}),
                )
                store_row(self.state, part, row)
        return len(parts)

    @locked
    def queues(self) -> Sequence[QueueEntry]:
        """The saved virtual queues."""
        return tuple(self.state.queue)


def _model_limits(state: State) -> Mapping[str, int]:
    limits: dict[str, int] = {}
    for instance in state.instances.values():
        for model in filter(lambda own: own.max_model_len, instance.beat.models):
            limits[model.name] = max(limits.get(model.name, 0), model.max_model_len)
    return limits


def _bound(run: RunData, tally: Tally, limits: Mapping[str, int]) -> int:
    if run.kind is EngineKind.EMBED:
        return 0
    return tally.max_tokens + tally.unbounded * limits.get(run.model, UNKNOWN_LENGTH)


def _run_view(state: State, part: Part, limits: Mapping[str, int]) -> RunView:
    run, tally = state.runs[part[0]], state.queued[part]
    batch = state.batches[run.batch_id].view
    return RunView(
        run_id=run.id,
        generation=part[1],
        batch_id=run.batch_id,
        tenant=run.tenant,
        model=run.model,
        kind=run.kind,
        slo_class=SloClass.BATCH,
        deadline=_deadline(state, part),
        created_at=batch.created_at,
        on_miss=batch.spec.on_miss,
        slices=tally.slices,
        requests=tally.requests,
        prompt_tokens=tally.prompt_tokens,
        max_tokens=_bound(run, tally, limits),
        prompts=run.prompts,
    )


def _deadline(state: State, part: Part) -> float:
    run = state.runs[part[0]]
    return run.deadline if part[1] == 1 else state.batches[run.batch_id].view.deadline


def _assigned_views(
    state: State, tallies: Mapping[Part, Tally], limits: Mapping[str, int]
) -> Iterable[AssignedView]:
    for part, tally in sorted(tallies.items(), key=lambda i: (_deadline(state, i[0]), i[0])):
        run = state.runs[part[0]]
        yield AssignedView(
            run_id=run.id,
            generation=part[1],
            batch_id=run.batch_id,
            tenant=run.tenant,
            model=run.model,
            deadline=_deadline(state, part),
            slices=tally.slices,
            leased_slices=tally.leased,
            requests=tally.requests,
            prompt_tokens=tally.prompt_tokens,
            max_tokens=_bound(run, tally, limits),
            prompts=run.prompts,
        )


def instance_views(state: State) -> tuple[InstanceView, ...]:
    """Instances seen within the hour and not retired, by name; silent ones are lost."""
    now, limits = state.clock(), _model_limits(state)
    views = []
    for name, instance in sorted(state.instances.items()):
        if instance.retired or now - instance.at > max(_FORGOTTEN_AFTER_S, 2 * state.silent_s):
            continue
        beat = instance.beat
        tallies = state.placed.get(name, {})
        view = InstanceView(
            name=name,
            boot_id=beat.boot_id,
            device=beat.device,
            state=beat.state,
            models=beat.models,
            slots=beat.slots,
            kv_tokens=beat.kv_tokens,
            running=beat.running,
            interactive_running=beat.interactive_running,
            batch_cap=beat.batch_cap,
            evictions=beat.evictions,
            recomputed_tokens=beat.recomputed_tokens,
            output_tokens=beat.output_tokens,
            kv_usage=beat.kv_usage,
            latencies=beat.latencies,
            generated=beat.generated,
            assigned=tuple(_assigned_views(state, tallies, limits)),
            suspect_slices=sum(tally.suspects for tally in tallies.values()),
            tokens_per_s=beat.tokens_per_s,
            interactive_share=beat.interactive_share,
        )
        silent = now - instance.at > state.silent_s
        views.append(replace(view, state=InstanceState.LOST) if silent else view)
    return tuple(views)
