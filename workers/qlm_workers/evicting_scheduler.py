"""A scheduler for vLLM that makes room for interactive requests by evicting batch work.

vLLM itself preempts only when a running request gets no KV, never for a waiting one. For
`vllm serve` see docs/eviction.md. It builds on private parts of vLLM's scheduler, which move
between releases: what differs from 0.26 to 0.33 is told by what is there, and only here.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, Self, cast

from vllm.platforms import current_platform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreEventType
from vllm.v1.request import RequestStatus

import qlm_workers.quick_exit  # noqa: F401 - this runs in the engine's core process
from qlm_batch.scheduling.eviction import (
    MOST_ALONE,
    QUIET_S,
    RETRY_STEPS,
    Running,
    Waiting,
    admission_limit,
    entering,
    gives_way_first,
    is_urgent,
    pace,
    victims,
)
from qlm_workers.told import EVICTIONS, RECOMPUTED, STEP_US

OPTIONS = "qlm"
"""The key in vLLM's `additional_config` under which this scheduler's options stand."""

_ADMITTED = (RequestStatus.WAITING, RequestStatus.PREEMPTED)
_GRAMMAR_WORDS = ("GRAMMAR", "FSM")
_QUEUES = ("waiting", "skipped_waiting", "kv_holding_waiting")
_LIMITS = ("max_num_active_reqs", "max_num_running_reqs")

logger = logging.getLogger(__name__)


class EvictingScheduler(Scheduler):  # type: ignore[misc]
    """vLLM's scheduler, synchronous or asynchronous as the engine is, with room for the urgent.

    Who gives a place away rests: for vLLM it runs, with its KV, but is in no step until there is a
    place again. Only where KV is short is one that rests preempted.

    Options in `additional_config["qlm"]`: `favour` (see `eviction.Favour`), `places`, how many
    requests may run (without it `max_num_seqs`), and `slots`, how many of batch work (without it
    `places` less the headroom). With `tell` the statistics carry how often requests gave way and
    how many tokens that cost, since the start, in `waiting_lora_adapters`: their one field that
    takes any name.

    vLLM's second model runner has room for `max_num_seqs` requests, those that rest included: what
    `places` leaves of them is how many can rest.
    """

    running: list[Any]
    max_num_scheduled_tokens: int

    def __new__(cls, vllm_config: Any, *_: Any, **__: Any) -> Self:
        """The subclass that fits the engine's way of scheduling."""
        asynchronous = vllm_config.scheduler_config.async_scheduling
        fitting = AsyncEvictingScheduler if asynchronous and cls is EvictingScheduler else cls
        return cast("Self", object.__new__(fitting))

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        options = options_of(vllm_config.additional_config)
        self._limit_name = next(name for name in _LIMITS if hasattr(self, name))
        limit: int = getattr(self, self._limit_name)
        self._size = min(limit, int(options.get("places") or limit))
        bounded = getattr(vllm_config, "use_v2_model_runner", False)
        self._kept: int | None = self.scheduler_config.max_num_seqs if bounded else None
        favour = str(options.get("favour", "balanced"))
        slots = int(options.get("slots") or self._size - pace(favour, self._size).headroom)
        self._slots = max(1, min(slots, self._size))
        self._pace = pace(favour, self._slots, processor=bool(current_platform.is_cpu()))
        self._tokens_per_step = self.max_num_scheduled_tokens
        self._decode_tokens = 1 + getattr(self, "num_spec_tokens", 0)
        self._kv_groups = max(1, len(self.kv_cache_config.kv_cache_groups))
        self._tells = bool(options.get("tell"))
        self._told = {EVICTIONS: 0, RECOMPUTED: 0}
        self._lost: dict[str, int] = {}
        self._resting: dict[str, Any] = {}
        self._awaited: list[Any] = []
        self._stalled = False
        self._evictions: dict[str, int] = {}
        self._tried: dict[str, int] = {}
        self._step = 0
        self._urgent_at = -QUIET_S
        self._alone_steps = 0
        self._orders = self.scheduler_config.policy == "priority"
        if not self._orders:
            logger.warning(
                "Priorities are ignored and nothing is evicted under the scheduling policy "
                "'%s'; start vLLM with --scheduling-policy priority.",
                self.scheduler_config.policy,
            )

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """One step: make room, then let vLLM fill the batch within its limits."""
        if not self._orders:
            return super().schedule(*args, **kwargs)
        self._step += 1
        held: list[Any] = []
        self._set_resting_aside()
        try:
            if not self._paused():
                held = self._make_room()
            else:
                self._run_again(self._size, time.monotonic())
            output = super().schedule(*args, **kwargs)
        finally:
            # Whoever looks between two steps finds those that rest among the running.
            self.running = [*self._resting.values(), *held, *self.running]
            while self._awaited:
                self.waiting.prepend_request(self._awaited.pop())
            self.max_num_scheduled_tokens = self._tokens_per_step
            setattr(self, self._limit_name, self._size)
        self._stalled = not output.total_num_scheduled_tokens
        self._count_recomputed(output)
        return output

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's statistics of a step, with this scheduler's counts; those that rest wait."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            resting = sum(request.request_id in self._resting for request in self.running)
            stats.num_running_reqs -= resting
            stats.num_waiting_reqs += resting
            if self._tells:
                stats.waiting_lora_adapters = stats.waiting_lora_adapters | self._told
        return stats

    def _set_resting_aside(self) -> None:
        """Take those that rest out of the running, and forget who is not there any more."""
        if self._resting:
            aside = [r for r in self.running if r.request_id in self._resting]
            self.running = [r for r in self.running if r.request_id not in self._resting]
            self._resting = {request.request_id: request for request in aside}

    def _make_room(self) -> list[Any]:
        """Let batch work give way and set this step's limits; who is held back for this step."""
        waiting = list(self._urgent_waiting())
        urgent = self._entering(waiting)
        now = time.monotonic()
        urgent_running = sum(is_urgent(request.priority) for request in self.running)
        if urgent or urgent_running:
            self._urgent_at = now
        if urgent:
            self._evict(urgent, now)
            self._fit_kept(urgent, now)
        places = self._limit(self._slots, urgent_running, waiting) - len(waiting)
        self._run_again(places, now)
        self._let_grow(now)
        held = self._held_back(urgent)
        limit = self._limit(0 if held else self._slots, urgent_running, urgent, len(held))
        if len(urgent) < len(waiting):
            limit = min(limit, len(self.running) + len(urgent))
        # A streaming session between two inputs keeps a place without running.
        idle = getattr(self, "num_waiting_for_streaming_input", 0)
        size = self._room() - len(held)
        setattr(self, self._limit_name, max(min(size, limit + idle), len(self.running)))
        self._bound_batch_prefill(urgent, now)
        return held

    def _limit(self, slots: int, urgent_running: int, urgent: list[Any], held: int = 0) -> int:
        return admission_limit(self._size - held, slots, urgent_running + len(urgent))

    def _room(self) -> int:
        """How many may run, held back or not, so that the model runner has room for all."""
        if self._kept is None:
            return self._size
        return min(self._size, self._kept - len(self._resting))

    def _fit_kept(self, urgent: list[Any], now: float) -> None:
        """Take from those that rest what the model runner keeps for them, where it runs short."""
        if self._kept is None:
            return
        inside = len(self.running) + min(len(urgent), self._size - len(self.running))
        for request in self._resting_by_rank():
            if inside + len(self._resting) <= self._kept:
                return
            self._leave(request, now)

    def _run_again(self, places: int, now: float) -> None:
        """Let those that rest run while fewer than `places` do, who gives way last coming first.

        One runs in any case after a step in which nobody did: who waits may wait for something that
        only those that rest can give.
        """
        order = self._resting_by_rank()
        while order and (len(self.running) < places or (self._stalled and not self.running)):
            request = order.pop()
            del self._resting[request.request_id]
            self.running.append(request)
            self._note(request, EngineCoreEventType.SCHEDULED, now)

    def _note(self, request: Any, what: Any, now: float) -> None:
        """Tell vLLM's own metrics what became of a request."""
        if self.log_stats:
            request.record_event(what, now)

    def _let_grow(self, now: float) -> None:
        """Take from those that rest the KV that running requests need in this step."""
        if not self._resting:
            return
        needed = sum(map(self._growth, self.running))
        for request in self._resting_by_rank():
            if needed <= self._free_kv():
                return
            self._leave(request, now)

    def _resting_by_rank(self) -> list[Any]:
        """Those that rest, in the order in which they give way."""
        resting = list(self._resting.values())
        order = gives_way_first([(request.priority, request.arrival_time) for request in resting])
        return [resting[index] for index in order]

    def _leave(self, request: Any, now: float) -> None:
        """Take the KV of one that rests; it waits, and keeps its tokens."""
        if self._frees_at_once(request):
            self._preempt_request(request, now)
            del self._resting[request.request_id]
            if getattr(request, "num_output_placeholders", 0):
                # Admitted in this very step it would compute the token still on its way again.
                self.waiting.remove_request(request)
                self._awaited.append(request)

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        computed = request.num_computed_tokens
        super()._preempt_request(request, *args, **kwargs)
        self._told[EVICTIONS] += request.request_id not in self._resting
        self._lost[request.request_id] = max(computed, self._lost.get(request.request_id, 0))

    def _count_recomputed(self, output: Any) -> None:
        """Count what requests that came back had lost and did not find in the prefix cache."""
        for request_id, lost in list(self._lost.items()):
            request = self.requests.get(request_id)
            if request is not None and request.status != RequestStatus.RUNNING:
                continue
            del self._lost[request_id]
            if request is not None:
                scheduled = output.num_scheduled_tokens.get(request_id, 0)
                found = request.num_computed_tokens - scheduled
                self._told[RECOMPUTED] += max(0, lost - found)

    def _urgent_waiting(self) -> Iterator[Any]:
        """Interactive requests that could start now, in the order of admission."""
        heads = [
            itertools.takewhile(lambda request: is_urgent(request.priority), queue)
            for name in _QUEUES
            if (queue := getattr(self, name, None)) and is_urgent(queue.peek_request().priority)
        ]
        for request in sorted(itertools.chain.from_iterable(heads)):
            if _startable(request):
                yield request

    def _evict(self, urgent: list[Any], now: float) -> None:
        """Let batch requests give way; they keep their tokens and wait for their turn."""
        if not any(
            self._step - self._tried.get(request.request_id, -RETRY_STEPS) >= RETRY_STEPS
            for request in urgent
        ):
            return
        free_slots = self._size - len(self.running)
        free_kv = self._free_kv()
        wanted = [Waiting(request.request_id, self._kv_of(request)) for request in urgent]
        growth = [self._growth(request) for request in self.running]
        short = sum(request.kv for request in wanted) + sum(growth) > free_kv
        if len(wanted) <= free_slots and not short:
            return
        inside = [*self.running, *self._resting.values()]
        growth += [0] * len(self._resting)
        chosen = victims(
            wanted,
            [
                Running(
                    request.request_id,
                    request.priority,
                    request.arrival_time,
                    self._held_kv(request) if short else 0,
                    grows,
                    rests=request.request_id in self._resting,
                )
                for request, grows in zip(inside, growth, strict=True)
            ],
            free_slots=free_slots,
            free_kv=free_kv,
            evictions=self._evictions,
        )
        self._tried.update(dict.fromkeys((request.id for request in wanted), self._step))
        for victim in [inside[index] for index in chosen.rest]:
            self.running.remove(victim)
            self._resting[victim.request_id] = victim
            self._note(victim, EngineCoreEventType.PREEMPTED, now)
            self._told[EVICTIONS] += 1
            self._evictions[victim.request_id] = self._evictions.get(victim.request_id, 0) + 1
        for victim in [inside[index] for index in chosen.leave]:
            self._leave(victim, now)
        self._forget_finished()

    def _held_back(self, urgent: list[Any]) -> list[Any]:
        """Batch requests taken out of this step, so that interactive prompts have it alone.

        MOST_ALONE steps in a row, and only if what is left of KV suffices without them: vLLM
        would take it from the interactive requests that run.
        """
        free_slots = self._size - len(self.running)
        may = self._pace.alone and self._alone_steps < MOST_ALONE
        alone = bool(urgent) and free_slots > 0 and may
        if alone:
            stay = [request for request in self.running if is_urgent(request.priority)]
            needed = sum(map(self._growth, stay)) + self._kv_of(urgent[0])
            alone = needed <= self._free_kv()
        self._alone_steps = self._alone_steps + 1 if alone else 0
        if not alone:
            return []
        held = [request for request in self.running if not is_urgent(request.priority)]
        self.running = stay
        return held

    def _bound_batch_prefill(self, urgent: list[Any], now: float) -> None:
        """Bound the step's prompt tokens of batch work while interactive requests are around."""
        if self._pace.batch_prefill is None or now - self._urgent_at > QUIET_S:
            return
        # In this order nobody is left without a token by a prompt before it.
        self.running.sort(
            key=lambda request: (
                not is_urgent(request.priority),
                self._new_tokens(request) > self._decode_tokens,
            )
        )
        tokens = self._pace.batch_prefill + sum(request.num_tokens for request in urgent)
        for request in self.running:
            new = self._new_tokens(request)
            tokens += new if is_urgent(request.priority) else min(new, self._decode_tokens)
        self.max_num_scheduled_tokens = min(self._tokens_per_step, tokens)

    def _paused(self) -> bool:
        state = getattr(self, "pause_state", None)
        return bool(state is not None and state.value != 0)

    def _free_kv(self) -> int:
        manager = self.kv_cache_manager
        free: int = manager.block_pool.get_num_free_blocks()
        return free - getattr(manager, "watermark_blocks", 0)

    def _entering(self, waiting: list[Any]) -> list[Any]:
        """Those of the interactive requests that wait that this step takes in."""
        together = self._pace.together
        if together is None or len(waiting) < 2:
            return waiting
        cached = self.kv_cache_manager.get_computed_blocks
        left = (request.num_tokens - cached(request)[1] for request in waiting)
        return waiting[: entering(left, together)]

    def _blocks(self, tokens: int) -> int:
        block_size: int = self.block_size
        return -(-tokens // block_size) * self._kv_groups

    def _kv_of(self, request: Any) -> int:
        """Blocks that admit `request`; it may need fewer if it shares a running prefix."""
        return self._blocks(request.num_tokens + self._decode_tokens)

    def _held_kv(self, request: Any) -> int:
        """Blocks that are free once `request` is gone."""
        groups = self.kv_cache_manager.get_blocks(request.request_id).blocks
        return sum(block.ref_cnt == 1 for group in groups for block in group)

    def _new_tokens(self, request: Any) -> int:
        tokens: int = request.num_tokens_with_spec - request.num_computed_tokens
        return max(0, tokens + getattr(request, "num_output_placeholders", 0))

    def _growth(self, request: Any) -> int:
        """Blocks that `request` takes in the next step."""
        computed = request.num_computed_tokens
        new = min(self._new_tokens(request), self._tokens_per_step)
        return self._blocks(computed + new) - self._blocks(computed)

    def _frees_at_once(self, request: Any) -> bool:
        check = getattr(self, "_request_blocks_can_be_freed", None)
        return bool(request.status == RequestStatus.RUNNING and (check is None or check(request)))

    def _forget_finished(self) -> None:
        for counts in (self._evictions, self._tried):
            for request_id in [each for each in counts if each not in self.requests]:
                del counts[request_id]


class AsyncEvictingScheduler(EvictingScheduler, AsyncScheduler):  # type: ignore[misc]
    """The same over vLLM's asynchronous scheduler, which prepares a step while another runs.

    vLLM times how long it waits for a step after the next one was prepared; here a step lasts from
    the end of the one before, or from its own beginning where nothing ran.
    """

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self._begun: deque[float] = deque()
        self._ended = float("-inf")

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """One step, and when it began."""
        self._begun.append(time.monotonic())
        return super().schedule(*args, **kwargs)

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        """What came of the oldest step under way, and how long it took."""
        now = time.monotonic()
        self._told[STEP_US] = round(1e6 * (now - max(self._ended, self._begun.popleft())))
        self._ended = now
        return super().update_from_output(*args, **kwargs)


def options_of(additional_config: Any) -> dict[str, Any]:
    """What stands for this scheduler in vLLM's `additional_config`."""
    options = additional_config.get(OPTIONS) if isinstance(additional_config, dict) else None
    return options if isinstance(options, dict) else {}


def _startable(request: Any) -> bool:
    """Whether a waiting request could be admitted: vLLM looks only once there is a place."""
    if request.status in _ADMITTED:
        return True
    if any(word in request.status.name for word in _GRAMMAR_WORDS):
        grammar = getattr(request.structured_output_request, "grammar", None)
        return grammar is not None and not isinstance(grammar, Exception)
    return False
