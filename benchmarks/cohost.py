"""What interactive users notice of a batch on the same engine, and what it costs the batch.

Real vLLM on a CPU or a GPU, everything through HTTP. Arms: `idle` (the service without a batch),
`service` (the service with a saturating batch, in windows between windows of `batch_only`), `fcfs`
and `priority` (vLLM's own server with the same batch and the same interactive load). Times are
seconds.

`step_p50` is slots over the median batch-only rate. `--kv` makes keys and values scarce instead of
places. `--instances 2` halves the slots over two engines and kills one in the middle of the load.
`--load .3` spreads the interactive requests, so that a slow machine takes as many steps between two
as a fast one. `--device cuda` takes a model, slots and a load of a GPU's size.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Not this folder first: its queue.py would hide the standard library's.
sys.path[0] = str(ROOT)

import aiohttp

from benchmarks.cohost_batch import TOKENS as LINE_TOKENS
from benchmarks.cohost_batch import Likeness, Service, answers, compare, file_of, keep_full
from benchmarks.cohost_batch import body as line_body
from benchmarks.cohost_forecast import Sizes, fitted
from benchmarks.interactive_load import Arrival, Counter, Seen, arrivals, play, samples, summary
from benchmarks.interactive_load import body as request_body
from benchmarks.random_llama import DUMMY, SHAPES
from benchmarks.random_llama import make as make_random
from benchmarks.support import CHAT, Stand, finish, load, require, say, stand
from benchmarks.vllm_server import vllm_server
from qlm_batch.domain.snapshot import Profile
from qlm_workers.processor import BLOCK_TOKENS

ARMS = ("idle", "service", "fcfs", "priority")
BURST_EVERY_S = 6.0
SETTLE_S = 3.0
"""Between a change of the load and the measurement of its rates."""
MODEL_LEN = 1024
BUDGET = 2048
REPEATS = 4
"""How often a second batch-only run has each body, about as often as the batch with traffic."""
DUE = 1_900_000_000
"""The deadline, as vLLM's priority, of batch work sent to vLLM's own server."""


@dataclass(frozen=True)
class Machine:
    """What fits a device: the engine's sizes, and the interactive load."""

    slots: int
    kv_bytes: int
    eager: bool
    rate: float
    burst: int
    lines_per_s: float
    """More lines of the batch than are answered in a second."""
    shape: str | None = None
    engine: Mapping[str, object] = field(default_factory=dict)
    """Arguments both servers get."""


MACHINES = {
    "cpu": Machine(32, 512 * 1024**2, eager=True, rate=3.0, burst=16, lines_per_s=40),
    "cuda": Machine(
        128,
        24 * 1024**3,
        eager=False,
        rate=20.0,
        burst=64,
        lines_per_s=120,
        shape="llama-8b",
        engine=DUMMY,
    ),
}


@dataclass(frozen=True)
class Plan:
    """Sizes of a run."""

    machine: Machine
    window_s: float
    rounds: int
    bodies: int
    slots: int
    instances: int
    dtype: str
    kv_blocks: int | None
    model: Path
    load: float
    """The share of the machine's interactive load that is asked for."""

    @property
    def arm_s(self) -> float:
        """How long the interactive load of an arm lasts."""
        return self.window_s * self.rounds

    @property
    def name(self) -> str:
        """What requests call the model."""
        return self.model.name

    def engine_args(self) -> dict[str, object]:
        """Arguments both servers get beyond the settings they share."""
        if self.kv_blocks is None:
            return {**self.machine.engine}
        blocks = {"num_gpu_blocks_override": self.kv_blocks, "block_size": BLOCK_TOKENS}
        return {**self.machine.engine, **blocks}

    def loads(self) -> list[list[Arrival]]:
        """The interactive load of each window: the same in every arm, so that medians compare."""
        every_s = min(BURST_EVERY_S / self.load, self.window_s)
        rate, burst = self.machine.rate * self.load, self.machine.burst
        seeds = range(1, self.rounds + 1)
        return [arrivals(self.window_s, rate, every_s, seed, burst) for seed in seeds]


def main() -> None:
    """Run the arms asked for and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--quick", action="store_true", help="small sizes, for development")
    parser.add_argument("--kv", type=int, nargs="?", const=240, metavar="BLOCKS")
    parser.add_argument("--instances", type=int, choices=(1, 2), default=1)
    parser.add_argument("--device", choices=tuple(MACHINES), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16 on a GPU")
    parser.add_argument("--window", type=float, metavar="SECONDS", help="of each load")
    parser.add_argument("--load", type=float, default=1.0, metavar="SHARE", help="of the load")
    options = parser.parse_args()
    machine = MACHINES[options.device]
    window_s = options.window or (7.0 if options.quick else 20.0) / options.load
    with tempfile.TemporaryDirectory(prefix="qlm-cohost-") as folder:
        plan = Plan(
            machine=machine,
            window_s=window_s,
            rounds=1 if options.quick else 3,
            bodies=32 if options.quick else 96,
            slots=machine.slots // options.instances,
            instances=options.instances,
            dtype=options.dtype or ("float32" if options.device == "cpu" else "bfloat16"),
            kv_blocks=options.kv,
            model=_make_model(Path(folder), machine.shape),
            load=options.load,
        )
        finish(asyncio.run(_run(plan, options.arms, Path(folder))))


def _make_model(folder: Path, shape: str | None) -> Path:
    if shape is not None:
        return make_random(folder / shape, SHAPES[shape])
    path = folder / "compute"
    make = [sys.executable, str(ROOT / "tools/tiny_model/compute_bound.py"), str(path)]
    subprocess.run([*make, "--layers", "8", "--hidden", "512"], check=True, stdout=sys.stderr)
    return path


async def _run(plan: Plan, arms: list[str], folder: Path) -> dict[str, object]:
    result: dict[str, object] = {}
    say(f"{load()}; {plan.instances} x {plan.slots} slots, {plan.dtype}")
    if "idle" in arms or "service" in arms:
        with _service(plan) as site:
            result |= await _service_arms(plan, site, arms)
    for policy in ("fcfs", "priority"):
        if policy in arms:
            with vllm_server(_arguments(plan, policy), folder / f"{policy}.log") as url:
                result[policy] = await _vllm_arm(plan, url, policy)
                say(f"{policy}: {result[policy]}")
    return result


# The service


@contextmanager
def _service(plan: Plan) -> Iterator[Stand]:
    with stand(
        engine="vllm",
        models=(str(plan.model),),
        slots=plan.slots,
        max_num_batched_tokens=BUDGET,
        max_model_len=MODEL_LEN,
        kv_cache_bytes=plan.machine.kv_bytes,
        dtype=plan.dtype,
        engine_args=plan.engine_args(),
        # Often told, so that tokens are counted to the window's edges.
        heartbeat_s=0.5,
    ) as site:
        for name in ("api", "scheduler", "files"):
            site.start(name)
        for number in range(plan.instances):
            site.start("worker", name=f"worker-{number}", instance=f"bench-{number}")
        yield site


async def _service_arms(plan: Plan, site: Stand, arms: list[str]) -> dict[str, object]:
    headers = {"authorization": f"Bearer {site.key}"}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(headers=headers, connector=connector) as session:
        url = f"http://{site.settings.host}:{site.settings.port}"
        await _until_served(session, f"{url}{CHAT}", plan)
        found: dict[str, object] = {}
        if "idle" in arms:
            before = _serving_s(site)
            found["idle"] = summary(await _play_all(session, url, plan))
            spent_s = _serving_s(site) - before
            say(f"idle: {found['idle']}; {spent_s:.1f} s of processor time around the engine")
        if "service" in arms:
            beside, learned = await _beside_a_batch(plan, site, session, url)
            found |= beside
        if "idle" in arms and "service" in arms and plan.instances == 1:
            found["foretold"] = await _foretold(plan, site, session, url, found, learned, spent_s)
        return found


def _serving_s(site: Stand) -> float:
    """Processor seconds so far of all that serves and sends calls, but for engines and Valkey."""
    spent = site.cpu_s()
    around = (
        cpu_s for name, cpu_s in spent.items() if name.startswith(("api", "worker", "postgres"))
    )
    return sum(around) + time.process_time()


async def _foretold(
    plan: Plan,
    site: Stand,
    session: aiohttp.ClientSession,
    url: str,
    found: dict[str, Any],
    learned: Sequence[Profile],
    spent_s: float,
) -> dict[str, float]:
    """What the simulator says of the service arm, beside what was measured.

    `learned` is from before it, and `spent_s` the processor time that went into the idle arm's
    calls around the engine.
    """
    sizes = Sizes(
        batch_prompt=await _prompt_tokens(session, url, line_body(plan.name, 0)),
        batch_output=LINE_TOKENS,
        interactive_prompt=await _prompt_tokens(session, url, request_body(plan.name, 0)),
    )
    (view,) = site.store.instances()
    cores = len(os.sched_getaffinity(0)) if view.device.startswith("cpu") else math.inf
    taken = spent_s / (plan.arm_s * cores)
    model = fitted(
        learned,
        plan.name,
        view.device,
        slots=plan.slots,
        kv_tokens=view.kv_tokens,
        batched_tokens=BUDGET,
        block_tokens=BLOCK_TOKENS,
        sizes=sizes,
        batch_only_rate=found["batch_only"]["batch_tokens_per_s"],
        idle=plan.loads(),
        window_s=plan.window_s,
        idle_alone_s=found["idle"]["ttft_alone_p50"],
        idle_burst_s=found["idle"]["ttft_burst_p50"],
        taken=taken,
    )
    told = model.told(plan.loads(), plan.window_s, batch=True)
    prompts = found["service"]["interactive_done"] * sizes.interactive_prompt
    share = prompts * model.step.per_prefill / plan.arm_s
    say(f"a step takes {model.step}; {model.limits}, {sizes}")
    say(f"outside {1e3 * model.outside_s:.1f} ms, and {1e3 * model.handling_s:.1f} ms shared")
    say(f"interactive prompts alone take {share:.1%} of the engine's time, calls {taken:.1%} of it")
    names = ("ttft_p50", "ttft_p95", "ttft_alone_p50", "ttft_burst_p50")
    measured = {name: found["service"][name] for name in names}
    measured["tokens_per_s"] = found["service"]["batch_tokens_per_s"]
    say(f"{'':<14}{'foretold':>10}{'measured':>10}{'off by':>9}")
    for name, was in measured.items():
        say(f"{name:<14}{told[name]:>10.4g}{was:>10.4g}{told[name] / was - 1:>8.1%}")
    return {name: round(value, 4) for name, value in told.items()}


async def _prompt_tokens(session: aiohttp.ClientSession, url: str, body: dict[str, object]) -> int:
    """How many tokens the engine makes of a body's prompt."""
    asked = {**body, "stream": False, "max_tokens": 1}
    async with session.post(f"{url}{CHAT}", json=asked) as answer:
        require(answer.status == 200, await answer.text())
        return int((await answer.json())["usage"]["prompt_tokens"])


async def _until_served(session: aiohttp.ClientSession, url: str, plan: Plan) -> None:
    """Wait until requests are answered, and warm the path."""
    give_up_at = time.monotonic() + 240
    warm = 0
    while warm < 8 * plan.instances:
        plan_of_one = arrivals(0.5, 2.0, 1e9, seed=warm) or arrivals(3.0, 2.0, 1e9, seed=7)
        seen = await play(session, url, plan.name, plan_of_one[:1], seed=900 + warm)
        ok = seen[0].ttft_s is not None
        warm += ok
        require(time.monotonic() < give_up_at, f"not served: {seen[0].fault}")
        if not ok:
            await asyncio.sleep(1.0)


async def _beside_a_batch(
    plan: Plan, site: Stand, session: aiohttp.ClientSession, url: str
) -> tuple[dict[str, object], Sequence[Profile]]:
    """The figures, and what the service had learned of its engine before the first mixture."""
    api = Service(session, f"{url}/v1")
    reference = await _reference(plan, api)
    spread = None
    if plan.dtype != "float32":
        # In the order of the long batch: who shares a step with whom decides the last bit.
        alike = file_of(plan.name, REPEATS * plan.bodies, plan.bodies)
        again = await api.output(await api.submit(alike), limit_s=1200)
        spread = compare(again, reference)
        say(f"two batch-only runs: {spread}")
    windows = 2 * plan.rounds + 1
    lines = int(windows * (plan.window_s + SETTLE_S) * plan.machine.lines_per_s)
    batch_id = await api.submit(file_of(plan.name, lines, plan.bodies))
    counter = Counter(session, f"{url}/metrics", "qlm_instance_output_tokens_total")
    watching = asyncio.create_task(counter.watch(0.25))
    rates: list[tuple[bool, float]] = []
    seen: list[Seen] = []
    learned: Sequence[Profile] = ()
    evictions = await _metric(session, url, "qlm_instance_evictions_total")
    for number in range(windows):
        busy = number % 2 == 1
        await asyncio.sleep(SETTLE_S)
        since = time.perf_counter()
        if busy:
            killer = None
            if plan.instances > 1 and number == 1:
                killer = asyncio.create_task(_kill_in(plan.window_s / 2, site, "worker-1"))
            seen += await _play(session, url, plan, number // 2)
            if killer is not None:
                await killer
            await asyncio.sleep(max(0.0, since + plan.window_s - time.perf_counter()))
        else:
            await asyncio.sleep(plan.window_s)
        until = time.perf_counter()
        await asyncio.sleep(1.0)
        rates.append((busy, counter.rate(since, until)))
        say(f"{'beside interactive' if busy else 'batch only'}: {rates[-1][1]:.0f} tokens/s")
        if number == 0:
            learned = site.store.snapshot().profiles
    evictions = await _metric(session, url, "qlm_instance_evictions_total") - evictions
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching
    await api.cancel(batch_id)
    likeness = compare(await api.output(batch_id), reference)
    say(f"outputs: {likeness}")
    only = [rate for busy, rate in rates if not busy]
    kept = [
        rates[at][1] / statistics.mean((rates[at - 1][1], rates[at + 1][1]))
        for at in range(1, windows, 2)
    ]
    service = summary(seen) | {
        "batch_tokens_per_s": round(statistics.median(r for busy, r in rates if busy), 1),
        "batch_share": round(statistics.median(kept), 4),
        "evictions": evictions,
    }
    say(f"service: {service}")
    for one in seen:
        if one.fault:
            say(f"failed: {one.fault}")
    figures: dict[str, object] = {
        "service": service,
        "batch_only": {
            "before": round(only[0], 1),
            "after": round(only[-1], 1),
            "batch_tokens_per_s": round(statistics.median(only), 1),
        },
        "step_p50": round(plan.slots * plan.instances / statistics.median(only), 5),
        "outputs_compared": likeness.compared,
        "outputs_identical": likeness.different == 0,
        **({} if spread is None else _shares(likeness, spread)),
    }
    return figures, learned


def _shares(likeness: Likeness, spread: Likeness) -> dict[str, object]:
    return {
        "differing_share": round(likeness.share, 4),
        "differing_share_of_batch_only": round(spread.share, 4),
    }


async def _reference(plan: Plan, api: Service) -> dict[str, dict[str, Any]]:
    """Each body's answer without interactive traffic, by its number."""
    began = time.monotonic()
    output = await api.output(await api.submit(file_of(plan.name, plan.bodies, plan.bodies)))
    say(f"reference outputs in {time.monotonic() - began:.0f} s")
    return {custom_id.split(":")[1]: choice for custom_id, choice in answers(output)}


async def _kill_in(seconds: float, site: Stand, name: str) -> None:
    """SIGKILL a worker, as a crash would."""
    await asyncio.sleep(seconds)
    process = site.processes.pop(name)
    say(f"killing {name}")
    process.signal(signal.SIGKILL)
    await asyncio.to_thread(process.wait, 10)


async def _metric(session: aiohttp.ClientSession, url: str, name: str) -> float:
    async with session.get(f"{url}/metrics") as answer:
        return sum(samples(await answer.text(), name).values())


# vLLM's own server


def _arguments(plan: Plan, policy: str) -> dict[str, object]:
    return {
        "model": str(plan.model),
        "served_model_name": plan.name,
        "dtype": plan.dtype,
        "max_num_seqs": plan.slots * plan.instances,
        "max_num_batched_tokens": BUDGET,
        "max_model_len": MODEL_LEN,
        "kv_cache_memory_bytes": plan.machine.kv_bytes,
        "scheduling_policy": policy,
        **({"enforce_eager": True} if plan.machine.eager else {}),
        **plan.engine_args(),
    }


async def _vllm_arm(plan: Plan, url: str, policy: str) -> dict[str, object]:
    ordered = policy == "priority"
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        await _until_served(session, f"{url}{CHAT}", plan)
        due = {"priority": DUE} if ordered else {}
        # A queue as long as the running batch, in which the service's own worker keeps its work.
        in_flight = 2 * plan.slots * plan.instances
        filling = asyncio.create_task(
            keep_full(session, f"{url}{CHAT}", plan.name, plan.bodies, in_flight, due)
        )
        await asyncio.sleep(2 * SETTLE_S)
        counter = Counter(session, f"{url}/metrics", "vllm:generation_tokens_total")
        watching = asyncio.create_task(counter.watch(0.5))
        preempted = await _metric(session, url, "vllm:num_preemptions_total")
        since = time.perf_counter()
        seen = await _play_all(session, url, plan, {"priority": 0} if ordered else {})
        rate = counter.rate(since, time.perf_counter())
        preempted = await _metric(session, url, "vllm:num_preemptions_total") - preempted
        for task in (filling, watching):
            require(not task.done(), f"a task of the load ended: {task}")
            task.cancel()
        await asyncio.gather(filling, watching, return_exceptions=True)
    return {**summary(seen), "batch_tokens_per_s": round(rate, 1), "evictions": preempted}


async def _play_all(
    session: aiohttp.ClientSession, url: str, plan: Plan, extra: dict[str, object] | None = None
) -> list[Seen]:
    """The load of all windows, one after another."""
    return [
        one
        for window in range(plan.rounds)
        for one in await _play(session, url, plan, window, extra)
    ]


async def _play(
    session: aiohttp.ClientSession,
    url: str,
    plan: Plan,
    window: int,
    extra: dict[str, object] | None = None,
) -> list[Seen]:
    wanted = plan.loads()[window]
    seen = await play(session, f"{url}{CHAT}", plan.name, wanted, window + 1, extra or {})
    for fault in sorted({one.fault for one in seen if one.fault}):
        say(f"not answered: {fault}")
    return seen


if __name__ == "__main__":
    main()
