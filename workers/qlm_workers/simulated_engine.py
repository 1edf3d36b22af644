"""A seeded engine without a model: it takes the time a device would take, or none at all."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
import zlib
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Self

import orjson

from qlm_batch.domain.engine import EngineAnswer, EngineInfo, EngineRequest, EngineStats, Lso
from qlm_batch.domain.errors import ConfigurationError, EngineDead
from qlm_batch.domain.jobs import EngineKind
from qlm_batch.domain.snapshot import Residency
from qlm_batch.scheduling.eviction import (
    Favour,
    Running,
    Waiting,
    admission_limit,
    is_urgent,
    pace,
    victims,
)
from qlm_batch.settings import Settings
from qlm_workers.adapters import Adapter
from qlm_workers.answers import Door, error_answer
from qlm_workers.simulated_answers import (
    BadBody,
    chunk_bodies,
    output_length,
    response_body,
    sizes,
    usage_chunk,
)
from qlm_workers.simulated_parts import AT_ONCE, NO_FAULTS, Faults, Inside, Job, SwapTimes
from qlm_workers.step_times import DEFAULT_DEVICE, DEVICES, StepTimes
from qlm_workers.streams import Stream, opened


class SimulatedEngine:
    """Answers are a function of the seed and the body. A step admits the waiting by priority,
    shares `max_num_batched_tokens` among prefills and gives every running sequence a token. It
    evicts as the vLLM scheduler does, but a victim finds nothing of its own in a prefix cache.

    `time_scale` stretches the modelled time: 1 is the device's own, 0 answers at once and then
    neither queues nor steps.
    """

    def __init__(
        self,
        model: str,
        kind: EngineKind = EngineKind.GENERATE,
        *,
        slots: int = 32,
        max_model_len: int = 8192,
        kv_tokens: int = 66_144,
        max_num_batched_tokens: int = 2048,
        step_times: StepTimes = DEVICES[DEFAULT_DEVICE],
        time_scale: float = 1.0,
        seed: int = 0,
        faults: Faults = NO_FAULTS,
        max_n: int = 16,
        favour: Favour = "balanced",
        swap_times: SwapTimes = AT_ONCE,
        adapters: Sequence[str] = (),
    ) -> None:
        self._swap_times = swap_times
        self._asleep = False
        self._info = EngineInfo(
            model,
            kind,
            max_model_len,
            slots,
            kv_tokens,
            frozenset(Lso),
            keeps_asleep=swap_times.keeps,
        )
        self._size = slots + pace(favour, slots).headroom
        self._evictions: dict[str, int] = {}
        self._evicted = 0
        self._recomputed = 0
        self._door = Door(model, kind, max_n, adapters=tuple(adapters))
        self._batched_tokens = max_num_batched_tokens
        self._step_times = step_times
        self._time_scale = time_scale
        self._seed = seed
        self._faults = faults
        self._faulty = faults is not NO_FAULTS
        self._alive = False
        self._loop: asyncio.Task[None] | None = None
        self._work = asyncio.Event()
        self._waiting: list[tuple[int, int, Inside]] = []
        self._arrivals = itertools.count()
        self._running: list[Inside] = []
        self._resting: list[Inside] = []
        self._hanging: list[Inside] = []
        self._steps = 0
        self._generated = 0
        self._rows: deque[tuple[int, int, int, float]] = deque(maxlen=4096)

    @classmethod
    def from_settings(
        cls, settings: Settings, model: str, kind: EngineKind, adapters: Sequence[Adapter] = ()
    ) -> Self:
        """As the settings say; `engine_args` may hold `device` (a key of DEVICES), `seed` and the
        fields of SwapTimes."""
        device = settings.engine_args.get("device", DEFAULT_DEVICE)
        if device not in DEVICES:
            raise ConfigurationError(
                f"'{device}' is no simulated device; QLM_ENGINE_ARGS may name one of "
                f"{', '.join(DEVICES)}.",
                param="device",
            )
        seed = settings.engine_args.get("seed", 0)
        times = {
            name: float(value)
            for name in ("load_s", "sleep_s", "wake_s")
            if isinstance(value := settings.engine_args.get(name), int | float)
        }
        keeps = settings.engine_args.get("keeps", True) is True
        return cls(
            model,
            kind,
            slots=settings.slots,
            max_model_len=settings.max_model_len or 8192,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            step_times=DEVICES[str(device)],
            time_scale=settings.simulated_time_scale,
            seed=seed if isinstance(seed, int) else 0,
            max_n=settings.max_n,
            favour=settings.favour,
            swap_times=SwapTimes(**times, keeps=keeps),
            adapters=tuple(adapter.name for adapter in adapters),
        )

    async def start(self) -> EngineInfo:
        """Be ready after the modelled time for loading."""
        await self._pass(self._swap_times.load_s)
        return self._begin()

    def _begin(self) -> EngineInfo:
        self._alive, self._asleep = True, False
        if self._time_scale > 0:
            self._loop = asyncio.create_task(self._run())
        return self._info

    async def sleep(self) -> Residency:
        """Keep or drop what is inside, as the swap times say."""
        if not self._alive or self._asleep:
            raise EngineDead(f"The simulated engine of '{self._info.model}' is not running.")
        if not self._swap_times.keeps:
            await self.stop()
            await self._pass(self._swap_times.sleep_s)
            return Residency.COLD
        self._asleep = True
        await self._end_loop()
        for sequence in (*self._running, *self._resting):
            sequence.prefilled, sequence.resumed = 0, sequence.generated
            self._wait(sequence)
        self._running.clear()
        self._resting.clear()
        await self._pass(self._swap_times.sleep_s)
        return Residency.ASLEEP

    async def wake(self) -> EngineInfo:
        """Be ready after the modelled time, unless the faults say otherwise."""
        times = self._swap_times
        await self._pass(times.wake_s if self._asleep else times.load_s)
        if not next(self._faults.wakes):
            raise EngineDead(f"The simulated engine of '{self._info.model}' did not wake.")
        return self._begin()

    async def _pass(self, seconds: float) -> None:
        await asyncio.sleep(seconds * self._time_scale)

    async def _end_loop(self) -> None:
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
            self._loop = None

    async def answer(self, request: EngineRequest) -> EngineAnswer:
        """Serve one request to its end."""
        job = self._admit(request)
        if isinstance(job, EngineAnswer):
            return job
        first_token_s = 0.0
        began = time.perf_counter()
        if job.hangs or self._time_scale > 0:
            first_token_s = await self._serve(job) - began
        else:
            self._steps += 1
            self._generated += job.output_tokens
        usage = job.usage
        return EngineAnswer(
            200,
            response_body(request, job.body, job.key, usage, job.stopped),
            usage,
            first_token_s,
            time.perf_counter() - began,
            cut=not job.stopped,
        )

    async def open_stream(self, request: EngineRequest) -> EngineAnswer | Stream:
        """Serve one request as a stream of its tokens as they are made."""
        job = self._admit(request, streamed=True)
        return job if isinstance(job, EngineAnswer) else await opened(self._events(job))

    async def _events(self, job: Job) -> AsyncGenerator[str, None]:
        chunks = iter(chunk_bodies(job.request, job.body, job.key, job.output_tokens, job.stopped))
        if job.hangs or self._time_scale > 0:
            moved = asyncio.Event()
            sequence = self._enter(job, moved)
            shown = 0
            try:
                while not sequence.done.done():
                    await moved.wait()
                    moved.clear()
                    while shown < sequence.generated:
                        shown += 1
                        for chunk in next(chunks):
                            yield chunk
                sequence.done.result()
            finally:
                sequence.done.cancel()
                self._leave(sequence)
        else:
            self._steps += 1
            self._generated += job.output_tokens
        for rest in chunks:
            for chunk in rest:
                yield chunk
        options = job.body.get("stream_options")
        if isinstance(options, Mapping) and options.get("include_usage"):
            yield usage_chunk(job.request, job.body, job.usage)

    def _admit(self, request: EngineRequest, *, streamed: bool = False) -> Job | EngineAnswer:
        if not self._alive or self._asleep:
            raise EngineDead(f"The simulated engine of '{self._info.model}' is not running.")
        body = self._door.read(request, streamed=streamed)
        if isinstance(body, EngineAnswer):
            return body
        said = {name: value for name, value in body.items() if not name.startswith("stream")}
        key = zlib.crc32(orjson.dumps(said), self._seed)
        try:
            prompt_tokens, limit = sizes(request.endpoint, body, self._info.max_model_len)
        except BadBody as error:
            return error_answer(400, str(error), param=error.param, code="invalid_value")
        hangs = False
        if self._faulty:
            if self._faults.poison(request):
                self._die()
                raise EngineDead("A poisonous request killed the simulated engine.")
            if self._faults.fails(request) or key % 10_000 < self._faults.error_rate * 10_000:
                return error_answer(500, "Simulated failure.", type_="server_error")
            hangs = self._faults.hangs(request)
        output_tokens = output_length(key, limit, body.get("ignore_eos") is True)
        return Job(request, body, key, prompt_tokens, output_tokens, limit, hangs)

    def stats(self) -> EngineStats:
        """What the engine is doing now. Raises EngineDead when it stopped."""
        if not self._alive:
            raise EngineDead(f"The simulated engine of '{self._info.model}' is not running.")
        rows = tuple(self._rows)
        self._rows.clear()
        return EngineStats(
            step=self._steps,
            running=len(self._running) + len(self._hanging),
            waiting=len(self._waiting) + len(self._resting),
            kv_usage=self._held() / self._info.kv_tokens,
            generated_tokens=self._generated,
            steps=rows,
            generated=tuple(sequence.generated for sequence in self._running),
            evictions=self._evicted,
            recomputed_tokens=self._recomputed,
        )

    async def stop(self) -> None:
        """End everything; safe to call twice."""
        self._die()
        await self._end_loop()

    def _die(self) -> None:
        self._alive = self._asleep = False
        if self._loop is not None:
            self._loop.cancel()
        waiting = (sequence for *_, sequence in self._waiting)
        for sequence in (*self._running, *self._resting, *waiting, *self._hanging):
            if not sequence.done.done():
                sequence.done.set_exception(EngineDead("The simulated engine stopped."))
            if sequence.moved is not None:
                sequence.moved.set()
        self._running.clear()
        self._resting.clear()
        self._waiting.clear()
        self._hanging.clear()

    async def _serve(self, job: Job) -> float:
        sequence = self._enter(job)
        try:
            return await sequence.done
        finally:
            self._leave(sequence)

    def _enter(self, job: Job, moved: asyncio.Event | None = None) -> Inside:
        done: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        sequence = Inside(
            job.request.request_id,
            job.request.priority,
            next(self._arrivals),
            job.prompt_tokens,
            job.output_tokens,
            done,
            job.hangs,
            moved=moved,
        )
        if self._time_scale > 0:
            self._wait(sequence)
            self._work.set()
        else:
            self._hanging.append(sequence)
        return sequence

    def _wait(self, sequence: Inside) -> None:
        heapq.heappush(self._waiting, (sequence.priority, sequence.arrival, sequence))

    def _leave(self, sequence: Inside) -> None:
        self._evictions.pop(sequence.request_id, None)
        self._hanging = [other for other in self._hanging if other is not sequence]
        if sequence.done.cancelled():
            self._running = [other for other in self._running if other is not sequence]
            self._resting = [other for other in self._resting if other is not sequence]
            self._waiting = [entry for entry in self._waiting if entry[2] is not sequence]
            heapq.heapify(self._waiting)

    async def _run(self) -> None:
        began = time.perf_counter()
        modelled = 0.0
        while True:
            if not (self._running or self._resting or self._waiting):
                self._work.clear()
                await self._work.wait()
                began, modelled = time.perf_counter(), 0.0
            step_s = self._step_times.seconds(*self._step_load())
            modelled += step_s * self._time_scale
            # One sleep may stand for many short steps: timers are no finer than this.
            ahead = modelled - (time.perf_counter() - began)
            await asyncio.sleep(ahead if ahead > 1e-3 else 0)
            self._finish_step(time.perf_counter(), step_s)

    def _step_load(self) -> tuple[int, int, int]:
        urgent = [entry[2] for entry in sorted(self._waiting) if is_urgent(entry[0])]
        if urgent:
            self._evict(urgent)
        urgent_running = sum(is_urgent(sequence.priority) for sequence in self._running)
        limit = admission_limit(self._size, self._info.slots, urgent_running + len(urgent))
        self._resting.sort(key=lambda sequence: (sequence.priority, sequence.arrival))
        while self._resting and len(self._running) + len(urgent) < limit:
            self._running.append(self._resting.pop(0))
        while self._waiting and len(self._running) < limit:
            sequence = self._waiting[0][2]
            if self._running and self._held() + sequence.to_prefill > self._info.kv_tokens:
                break
            heapq.heappop(self._waiting)
            self._running.append(sequence)
        prefilling = [sequence for sequence in self._running if sequence.to_prefill > 0]
        # A decoding sequence takes one token of the step's budget.
        budget = self._batched_tokens - (len(self._running) - len(prefilling))
        prefill = 0
        for sequence in prefilling:
            taken = min(sequence.to_prefill, budget - prefill)
            sequence.prefilled += max(0, taken)
            prefill += max(0, taken)
        load = (len(self._running), self._kv(), prefill)
        self._rows.append((*load, self._step_times.seconds(*load)))
        return load

    def _evict(self, urgent: list[Inside]) -> None:
        inside = [*self._running, *self._resting]
        chosen = victims(
            [Waiting(sequence.request_id, sequence.prompt_tokens) for sequence in urgent],
            [
                Running(each.request_id, each.priority, each.arrival, each.kv, 1)
                for each in self._running
            ]
            + [
                Running(each.request_id, each.priority, each.arrival, each.kv, 0, rests=True)
                for each in self._resting
            ],
            free_slots=self._size - len(self._running),
            free_kv=self._info.kv_tokens - self._held(),
            evictions=self._evictions,
        )
        for victim in [inside[index] for index in chosen.rest]:
            self._running.remove(victim)
            self._resting.append(victim)
            self._evicted += 1
            self._evictions[victim.request_id] = self._evictions.get(victim.request_id, 0) + 1
        for victim in [inside[index] for index in chosen.leave]:
            self._resting.remove(victim)
            self._recomputed += victim.kv
            victim.prefilled, victim.resumed = 0, victim.generated
            self._wait(victim)

    def _finish_step(self, now: float, step_s: float) -> None:
        if not self._running:
            return
        self._steps += any(not sequence.hangs for sequence in self._running)
        still = []
        for sequence in self._running:
            if sequence.to_prefill <= 0 and not sequence.hangs:
                if sequence.first_token_at is None:
                    sequence.first_token_at = now
                if sequence.generated < sequence.output_tokens:
                    sequence.generated += 1
                    self._generated += 1
                if sequence.moved is not None:
                    sequence.moved.set()
                if sequence.generated >= sequence.output_tokens:
                    if not sequence.done.done():
                        sequence.done.set_result(sequence.first_token_at)
                    continue
            still.append(sequence)
        self._running = still

    def _kv(self) -> int:
        """Tokens of key-value memory that the running batch reads."""
        return sum(sequence.kv for sequence in self._running)

    def _held(self) -> int:
        """Those that nobody else can have."""
        return self._kv() + sum(sequence.kv for sequence in self._resting)
