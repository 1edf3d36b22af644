"""Two models on one instance that holds one at a time: deadlines, swaps, and a kill half way.

Batches of both models come at once with alternating deadlines, tight ones and roomy ones. The
simulator runs the same work on the step times, lengths and swap times measured here; the service
must meet every deadline that the simulator meets, with no more swaps. Since a machine's speed
drifts, the simulator is asked once more afterwards, with what the case itself was measured at. Then
the worker is killed with SIGKILL while it loads a model. Every answer is compared with the only
right one.

On a GPU models sleep with their weights in the host's memory. `--shape` takes two models of random
weights instead of two of the shipped one, whose answers are then only counted.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Not this folder first: its queue.py would hide the standard library's.
sys.path[0] = str(ROOT)

import numpy as np
import orjson
import structlog

from benchmarks.random_llama import DUMMY, SHAPES
from benchmarks.random_llama import make as make_random
from benchmarks.support import CHAT, TENANT, Stand, finish, load, require, say, stand, wait_until
from qlm_batch.bootstrap import open_blobs
from qlm_batch.domain.jobs import BatchSpec, FilePurpose, FileRecord, SloClass
from qlm_batch.domain.snapshot import ModelView
from qlm_batch.ids import BATCH, FILE, new_id
from qlm_batch.models import tiny_model_path
from qlm_batch.models.prompts import Prompt, chat_body, is_right, long_output, split_tokens
from qlm_batch.scheduling.policies import policy
from qlm_batch.scheduling.profile import Knowledge
from qlm_batch.scheduling.speed import StepTime
from qlm_batch.simulation.cluster import START, Cluster, SimulationConfig
from qlm_batch.simulation.devices import DeviceProfile
from qlm_batch.simulation.fleet import Fleet, InstanceSpec
from qlm_batch.simulation.workload import Arrival, WorkClass, Workload

MODELS = ("tiny-a", "tiny-b")
SLOTS = 32
MAX_TOKENS = 512
DEVICE = "cpu"
SETTLE_S = 5.0
"""Between learning the machine and the work that counts."""


@dataclass(frozen=True)
class Job:
    """One batch: its model, its lines, and how long it may take."""

    model: str
    prompts: Sequence[Prompt]
    window_s: float


@dataclass(frozen=True)
class Measured:
    """What was learned about the machine: lines per second, and seconds of a swap.

    `load_s` is the first swap, to a model that was never loaded. `steps` are each model's, with
    what the engine loses between them.
    """

    lines_per_s: float
    load_s: float
    swap_s: float
    steps: Mapping[str, StepTime]
    kv_tokens: int

    @property
    def leave_s(self) -> float:
        """The part in which a model goes."""
        return 0.2 * self.swap_s

    @property
    def arrive_s(self) -> float:
        """The part in which the other comes."""
        return 0.8 * self.swap_s


@dataclass(frozen=True, slots=True)
class MeasuredProfile(DeviceProfile):
    """A device whose swap times were measured."""

    out_s: float = 0.0
    in_s: float = 0.0

    @property
    def sleep_s(self) -> float:
        """Time to leave."""
        return self.out_s

    @property
    def wake_s(self) -> float:
        """Time to come."""
        return self.in_s


class Site:
    """A worker with both models on servers of its own, and what was asked of it."""

    def __init__(self, stand: Stand, *, knows: bool) -> None:
        self.stand = stand
        self.knows = knows
        self.blobs = open_blobs(stand.settings)

    def submit(self, job: Job) -> str:
        """Hand a batch in; returns its id."""
        lines = (
            orjson.dumps(
                {
                    "custom_id": str(n),
                    "method": "POST",
                    "url": CHAT,
                    "body": self._body(job.model, prompt),
                }
            )
            for n, prompt in enumerate(job.prompts)
        )
        path = self.stand.settings.data_dir / f"{new_id(FILE)}.jsonl"
        path.write_bytes(b"\n".join(lines))
        store = self.stand.store
        record = FileRecord(
            id=new_id(FILE),
            tenant=TENANT,
            purpose=FilePurpose.BATCH,
            filename=path.name,
            bytes=path.stat().st_size,
            sha256="",
            blob_key=f"files/{path.name}",
            created_at=store.now(),
        )
        self.blobs.adopt(record.blob_key, str(path))
        store.add_file(record)
        batch_id = new_id(BATCH)
        window = f"{max(10, round(job.window_s))}s"
        store.create_batch(batch_id, BatchSpec(TENANT, CHAT, record.id, window, job.window_s))
        return batch_id

    def _body(self, model: str, prompt: Prompt) -> dict[str, object]:
        if self.knows:
            return chat_body(prompt, model=model, max_tokens=MAX_TOKENS)
        # Without a trained model the answer's length has to be asked for.
        exact = {"ignore_eos": True}
        return chat_body(prompt, model=model, max_tokens=prompt.output_tokens) | exact

    def submit_together(self, jobs: Sequence[Job]) -> list[str]:
        """Hand batches in so that the scheduler sees them all at once, as the simulator's does."""
        scheduler = self.stand.processes["scheduler"].pid
        assert scheduler is not None
        os.kill(scheduler, signal.SIGSTOP)
        try:
            batch_ids = [self.submit(job) for job in jobs]
            wait_until(
                lambda: all(
                    self.stand.store.batch(TENANT, batch_id).state.value == "in_progress"
                    for batch_id in batch_ids
                ),
                "intake",
                60,
            )
        finally:
            os.kill(scheduler, signal.SIGCONT)
        return batch_ids

    def planned_swaps(self, batch_ids: Sequence[str], awake: str) -> int:
        """Swaps in the first plan that holds all these batches, starting with the awake model."""
        statement = (
            "SELECT coalesce(json_agg(json_build_array(r.batch_id, r.model) ORDER BY q.position),"
            " '[]') FROM virtual_queue q JOIN run r"
            " ON r.id = split_part(q.group_key, '.', 1)::bigint"
        )
        order: list[tuple[str, str]] = []

        def planned() -> bool:
            order[:] = self.stand.query(statement)[0]
            return {batch_id for batch_id, _ in order} >= set(batch_ids)

        wait_until(planned, "a plan", 60, every_s=0.02)
        models = [awake, *(model for _, model in order)]
        return sum(a != b for a, b in pairwise(models))

    def wait(self, batch_ids: Sequence[str], seconds: float = 3600) -> None:
        """Until all of them have ended."""
        ended = ("completed", "failed", "expired")
        wait_until(
            lambda: all(
                self.stand.store.batch(TENANT, batch_id).state.value in ended
                for batch_id in batch_ids
            ),
            "batches",
            seconds,
        )

    def models(self) -> dict[str, ModelView]:
        """The models as the instance told them last."""
        (view,) = self.stand.store.instances()
        return {model.name: model for model in view.models}

    def swaps(self) -> tuple[int, float]:
        """Swaps since the worker's boot, and the seconds they took in all."""
        models = self.models().values()
        return sum(model.swaps for model in models), sum(model.swap_s for model in models)

    def steps(self) -> dict[str, StepTime]:
        """Each model's step times as the clock sees them: with what is lost between two."""
        snapshot = self.stand.store.snapshot()
        (view,) = snapshot.instances
        known = Knowledge.of(snapshot.profiles)
        speeds = {model: known.speed(model, view.device) for model in MODELS}
        return {
            model: speed.step_time().times(1.0 / speed.efficiency)
            for model, speed in speeds.items()
        }

    def phase(self) -> str:
        """What the instance is busy with besides serving."""
        return str(self.stand.query("SELECT phase FROM instance")[0])

    def audit(self, batch_id: str, prompts: Sequence[Prompt]) -> tuple[int, int, int]:
        """How many of the batch's lines were lost, told twice, and answered wrongly."""
        batch = self.stand.store.batch(TENANT, batch_id)
        told: Counter[str] = Counter()
        wrong = 0
        for file_id in (batch.output_file_id, batch.error_file_id):
            if file_id is None:
                continue
            with self.blobs.open(self.stand.store.file(TENANT, file_id).blob_key) as file:
                for line in file.read().splitlines():
                    row = orjson.loads(line)
                    told[row["custom_id"]] += 1
                    wrong += not _right(row, prompts, knows=self.knows)
        lost = len(prompts) - len(told)
        return lost, sum(count - 1 for count in told.values()), wrong


def _right(row: dict[str, object], prompts: Sequence[Prompt], *, knows: bool) -> bool:
    response = row["response"]
    if not isinstance(response, dict) or response["status_code"] != 200:
        return False
    if not knows:
        return True
    said = response["body"]["choices"][0]["message"]["content"]
    return is_right(prompts[int(str(row["custom_id"]))], said)


def main() -> None:
    """Print what was met and what the simulator meets, case by case."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=["vllm", "simulated"], default="vllm")
    parser.add_argument("--lines", type=int, default=600, help="lines of each batch")
    parser.add_argument("--pairs", type=int, default=2, help="batches of each model")
    parser.add_argument("--skip-kill", action="store_true")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="for a GPU")
    options = parser.parse_args()
    result: dict[str, object] = {"engine": options.engine}
    with tempfile.TemporaryDirectory(prefix="qlm-swap-") as folder, _site(options, folder) as made:
        site = Site(made, knows=options.engine == "vllm" and options.shape is None)
        machine = _learn(site, options.lines)
        result["load_s"] = round(machine.load_s, 2)
        result["swap_s"] = round(machine.swap_s, 2)
        result["lines_per_s"] = round(machine.lines_per_s, 1)
        for name, slack in (("tight", 0.35), ("roomy", 4.0)):
            result[name] = _case(site, machine, options, name, slack)
        if not options.skip_kill:
            result["killed"] = _killed(site, machine, options.lines)
    finish(result)


def _site(options: argparse.Namespace, folder: str):  # type: ignore[no-untyped-def]
    engine_args: dict[str, object] = {}
    models = MODELS
    kv_bytes = 256 * 1024**2
    if options.shape is not None:
        made = (make_random(Path(folder) / name, SHAPES[options.shape]) for name in MODELS)
        models = tuple(map(str, made))  # type: ignore[assignment]
        engine_args, kv_bytes = {**DUMMY}, 8 * 1024**3
    elif options.engine == "simulated":
        engine_args = {"load_s": 3.0, "sleep_s": 1.0, "keeps": False, "device": "mistral-7b/h100"}
    else:
        models = tuple(_linked(Path(folder) / name) for name in MODELS)  # type: ignore[assignment]
    return stand(
        engine=options.engine,
        models=models,
        models_awake=1,
        slots=SLOTS,
        max_model_len=1024,
        kv_cache_bytes=kv_bytes,
        dtype=options.dtype,
        instance="bench-0",
        engine_args=engine_args,
    )


def _linked(path: Path) -> str:
    """The shipped model under another name: a folder is served under its own name."""
    path.mkdir()
    for file in tiny_model_path().iterdir():
        (path / file.name).symlink_to(file.resolve())
    return str(path)


def _prompts(lines: int, seed: int) -> list[Prompt]:
    return long_output(lines, seed, 40, 200)


def _learn(site: Site, lines: int) -> Measured:
    """One batch of each model with plenty of time: speeds, lengths, and two swaps."""
    for name in ("scheduler", "files", "worker"):
        site.stand.start(name)
    seconds, swapped = [], []
    for model in (MODELS[0], MODELS[1], MODELS[0], MODELS[1]):
        batch_id = site.submit(Job(model, _prompts(lines // 2, 1), 86_400.0))
        site.wait([batch_id])
        rows = "SELECT max(stored_at) - min(started_at) FROM result x JOIN run r ON r.id = x.run_id"
        (took,) = site.stand.query(f"{rows} WHERE r.batch_id = '{batch_id}'")
        seconds.append(float(took))
        time.sleep(site.stand.settings.heartbeat_s + 0.5)
        swapped.append(site.swaps()[1])
    (view,) = site.stand.store.instances()
    own = site.models()[MODELS[0]]
    require(own.wake_s is not None, "no swap time was told")
    return Measured(
        lines_per_s=len(seconds) * (lines // 2) / sum(seconds),
        load_s=swapped[1] - swapped[0],
        swap_s=(swapped[3] - swapped[1]) / 2,
        steps=site.steps(),
        kv_tokens=view.kv_tokens,
    )


def _jobs(machine: Measured, options: argparse.Namespace, slack: float) -> list[Job]:
    """Batches of alternating models; each window is the time to do all before it, and slack."""
    work_s, jobs, due_s = options.lines / machine.lines_per_s, [], 0.0
    for number in range(2 * options.pairs):
        due_s += work_s + machine.swap_s
        window_s = due_s + slack * (work_s + machine.swap_s)
        model = MODELS[number % 2]
        jobs.append(Job(model, _prompts(options.lines, 10 + number), window_s))
    return jobs


def _case(
    site: Site, machine: Measured, options: argparse.Namespace, name: str, slack: float
) -> dict[str, object]:
    jobs = _jobs(machine, options, slack)
    awake = [own.name for own in site.models().values() if own.residency.value == "awake"]
    require(len(awake) == 1, f"{awake} are awake")
    can, planned = _simulated(machine, options, jobs, awake[0])
    before, before_s = site.swaps()
    batch_ids = site.submit_together(jobs)
    first_plan = site.planned_swaps(batch_ids, awake[0])
    site.wait(batch_ids)
    time.sleep(site.stand.settings.heartbeat_s + 0.5)
    after, after_s = site.swaps()
    swaps = after - before
    swap_s = (after_s - before_s) / swaps if swaps else machine.swap_s
    had = replace(machine, swap_s=swap_s, steps=site.steps())
    could, _ = _simulated(had, options, jobs, awake[0])
    met, margins = [], []
    wrong = lost = twice = 0
    for batch_id, job in zip(batch_ids, jobs, strict=True):
        batch = site.stand.store.batch(TENANT, batch_id)
        (last,) = site.stand.query(
            "SELECT max(x.stored_at) FROM result x JOIN run r ON r.id = x.run_id "
            f"WHERE r.batch_id = '{batch_id}'"
        )
        met.append(batch.state.value == "completed" and batch.counts.failed == 0)
        margins.append(round(batch.deadline - float(last), 1))
        gone, again, bad = site.audit(batch_id, job.prompts)
        lost, twice, wrong = lost + gone, twice + again, wrong + bad
    say(f"{name}: met {met}, can be met {can}, could be met at the speed it had {could}")
    say(f"{name}: margins {margins} s, {swaps} swaps of {swap_s:.1f} s ({load()})")
    return {
        "batches": len(jobs),
        "met": sum(met),
        "simulator_met": sum(can),
        "met_where_it_can_be": _covers(met, can),
        "simulator_met_at_its_speed": sum(could),
        "met_where_it_could_be": _covers(met, [a and b for a, b in zip(can, could, strict=True)]),
        "swaps": swaps,
        "swap_s": round(swap_s, 2),
        "planned_swaps": first_plan,
        "simulator_swaps": planned,
        "margins_s": margins,
        "lost": lost,
        "twice": twice,
        "wrong": wrong,
        "lines": sum(len(job.prompts) for job in jobs),
    }


def _covers(met: Sequence[bool], can: Sequence[bool]) -> bool:
    return all(a or not b for a, b in zip(met, can, strict=True))


def _simulated(
    machine: Measured, options: argparse.Namespace, jobs: Sequence[Job], awake: str
) -> tuple[list[bool], int]:
    """Which deadlines the simulator meets, and with how many swaps."""
    order = (awake, *(model for model in MODELS if model != awake))
    profiles = tuple(
        MeasuredProfile(
            model,
            DEVICE,
            machine.steps[model],
            machine.kv_tokens,
            SLOTS,
            1.0,
            out_s=machine.leave_s,
            in_s=machine.arrive_s,
        )
        for model in order
    )
    fleet = Fleet((InstanceSpec("i-0", DEVICE, profiles, order, SLOTS, machine.kv_tokens),))
    learning = [(order[0], 0.0), (order[1], 60.0), (order[0], 300.0)]
    classes = [WorkClass("learning", SloClass.BATCH, 86_400.0)]
    arrivals = [
        _arrival(at, 0, Job(model, _prompts(options.lines // 2, 1), 0.0)) for model, at in learning
    ]
    begin = 600.0
    for number, job in enumerate(jobs):
        classes.append(WorkClass(f"job-{number}", SloClass.BATCH, job.window_s))
        arrivals.append(_arrival(begin, number + 1, job))
    work = Workload("swap", tuple(classes), tuple(arrivals), begin, MAX_TOKENS)
    config = SimulationConfig(plan_ms=20.0, draw=True, drain_s=86_400.0)
    outcome = Cluster(fleet, work, policy("qlm"), config).run()
    requests = outcome.requests
    met = [bool(requests.on_time[requests.work_class == n + 1].all()) for n in range(len(jobs))]
    spans = [span for own in outcome.tallies.values() for span in own.spans]
    swaps = sum(span.what == "swap" and span.end > START + begin for span in spans)
    return met, swaps


def _arrival(at: float, work_class: int, job: Job) -> Arrival:
    prompts = np.array([len(split_tokens(own.text)) + 4 for own in job.prompts])
    outputs = np.array([own.output_tokens for own in job.prompts])
    return Arrival(at, work_class, job.model, TENANT, prompts, outputs)


def _killed(site: Site, machine: Measured, lines: int) -> dict[str, object]:
    """Kill the worker while it loads a model, start it again, and count what became of all."""
    asleep = [own.name for own in site.models().values() if own.residency.value != "awake"]
    awake = next(name for name in MODELS if name not in asleep)
    prompts = _prompts(lines, 99)
    jobs = [Job(awake, prompts, 3600.0), Job(asleep[0], prompts, 3000.0)]
    batch_ids = site.submit_together(jobs)
    wait_until(lambda: site.phase().startswith("waking"), "a swap", 600, every_s=0.02)
    worker = site.stand.processes["worker"]
    require(worker.pid is not None, "the worker has no process")
    time.sleep(0.4 * machine.arrive_s)
    os.kill(int(worker.pid or 0), signal.SIGKILL)
    worker.stop()
    killed_at = time.monotonic()
    site.stand.start("worker")
    site.wait(batch_ids, 900)
    audits = [site.audit(batch_id, prompts) for batch_id in batch_ids]
    states = [site.stand.store.batch(TENANT, batch_id).state.value for batch_id in batch_ids]
    return {
        "states": states,
        "lines": 2 * lines,
        "lost": sum(lost for lost, _, _ in audits),
        "twice": sum(twice for _, twice, _ in audits),
        "wrong": sum(wrong for _, _, wrong in audits),
        "seconds_after": round(time.monotonic() - killed_at, 1),
    }


if __name__ == "__main__":
    main()
