"""Requests a second of real vLLM through the service, through run-batch, and through LLM.chat.

All three have the same model, type, slots and token budget and take their turns, several rounds
over; while one runs the others are stopped. In its turn each gets a file to warm up, a small one
and a large one; the rate is the marginal one, from the two times. Every output is parsed and its
tokens are counted. `--only llama-8b` is for a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Not this folder first: its queue.py would hide the standard library's.
sys.path[0] = str(ROOT)

import orjson
import psutil

from benchmarks.contenders import Contender
from benchmarks.random_llama import DUMMY, SHAPES
from benchmarks.random_llama import make as make_random
from benchmarks.support import CHAT, TENANT, Stand, finish, load, require, say, stand, wait_until
from qlm_batch.bootstrap import open_blobs
from qlm_batch.domain.jobs import BatchSpec, FilePurpose, FileRecord
from qlm_batch.domain.snapshot import InstanceState
from qlm_batch.ids import BATCH, FILE, new_id
from qlm_batch.models import tiny_model_path

WARM_UP = 16
WORDS = ("what", "is", "the", "next", "number", "after", "these", "and", "which", "word")


@dataclass(frozen=True)
class Setup:
    """One model and how all three run it."""

    name: str
    model: str
    sizes: tuple[int, int]
    max_tokens: int = 64
    slots: int = 64
    budget: int = 2048
    model_len: int = 512
    dtype: str = "float32"
    kv_bytes: int = 512 * 1024**2
    eager: bool = True
    further: Mapping[str, object] = field(default_factory=dict)

    @property
    def files(self) -> tuple[int, int, int]:
        """Lines of each file a contender is given: to warm up, and the two that count."""
        return (WARM_UP, *self.sizes)

    def write(self, path: Path, lines: int, first: int) -> None:
        """An input file of prompts that no other `first` has, with answers of equal length."""
        with path.open("wb") as file:
            for number in range(lines):
                file.write(orjson.dumps(self._line(number, first + number)) + b"\n")

    def _line(self, custom_id: int, number: int) -> dict[str, object]:
        words = " ".join(WORDS[(number * 7 + n * n) % len(WORDS)] for n in range(16))
        body = {
            "model": self.name,
            "messages": [{"role": "user", "content": f"{number} {words}"}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        return {"custom_id": str(custom_id), "method": "POST", "url": CHAT, "body": body}

    def engine_args(self) -> dict[str, object]:
        """vLLM's arguments, for run-batch and LLM alike."""
        return {
            "model": self.model,
            "served_model_name": self.name,
            "dtype": self.dtype,
            "max_num_seqs": self.slots,
            "max_num_batched_tokens": self.budget,
            "max_model_len": self.model_len,
            "kv_cache_memory_bytes": self.kv_bytes,
            **({"enforce_eager": True} if self.eager else {}),
            **self.further,
        }


def main() -> None:
    """Print the median rates of each contender on each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["tiny", "compute", *SHAPES])
    parser.add_argument("--sizes", type=int, nargs=2, metavar=("SMALL", "LARGE"))
    options = parser.parse_args()
    result: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="qlm-throughput-") as folder:
        for name in (options.only,) if options.only else ("tiny", "compute"):
            setup = _setup(name, Path(folder), options.sizes)
            result[name] = _compare(setup, Path(folder), options.rounds)
    finish(result)


def _setup(name: str, folder: Path, sizes: list[int] | None) -> Setup:
    if name == "tiny":
        return Setup("tiny", str(tiny_model_path()), tuple(sizes or (200, 1_700)))  # type: ignore[arg-type]
    if name in SHAPES:
        return Setup(
            name,
            str(make_random(folder / name, SHAPES[name])),
            tuple(sizes or (1_000, 5_000)),  # type: ignore[arg-type]
            slots=128,
            dtype="bfloat16",
            kv_bytes=4 * 1024**3,
            eager=False,
            # All three are on the GPU at once, and take turns.
            further={**DUMMY, "gpu_memory_utilization": 0.3},
        )
    path = folder / "compute"
    make = [sys.executable, str(ROOT / "tools/tiny_model/compute_bound.py"), str(path)]
    subprocess.run([*make, "--layers", "8", "--hidden", "512"], check=True, stdout=sys.stderr)
    return Setup("compute", str(path), tuple(sizes or (48, 208)))  # type: ignore[arg-type]


def _compare(setup: Setup, folder: Path, rounds: int) -> Mapping[str, float]:
    with contextlib.ExitStack() as running:
        site = running.enter_context(_service(setup, folder))
        runs: dict[str, Callable[[Path, Path], float]] = {
            "service": lambda source, target: _one_batch(site, source, target)
        }
        owners = {"service": [p.pid for p in site.processes.values() if p.pid is not None]}
        for name in ("run_batch", "llm_chat"):
            log = folder / f"{setup.name}-{name}.log"
            made = Contender(name, setup.engine_args(), setup.max_tokens, log)
            running.callback(made.stop)
            runs[name], owners[name] = made.run, [made.pid]
        rates = _rounds(setup, folder, rounds, runs, owners)
    return {name: round(statistics.median(found), 1) for name, found in rates.items()}


def _rounds(
    setup: Setup,
    folder: Path,
    rounds: int,
    runs: Mapping[str, Callable[[Path, Path], float]],
    owners: Mapping[str, Sequence[int]],
) -> Mapping[str, Sequence[float]]:
    small, large = setup.sizes
    rates: dict[str, list[float]] = {name: [] for name in runs}
    first = 0
    for number in range(rounds):
        # Each round begins with another one, so that a drift of the machine favours nobody.
        turn = number % len(runs)
        for name in [*runs][turn:] + [*runs][:turn]:
            with _others_stopped(pid for other in owners if other != name for pid in owners[other]):
                times = []
                for lines in setup.files:
                    source, target = folder / "in.jsonl", folder / "out.jsonl"
                    setup.write(source, lines, first)
                    first += lines
                    times.append(runs[name](source, target))
                    _check(target.read_bytes(), lines, setup)
            rates[name].append((large - small) / (times[2] - times[1]))
            say(f"{setup.name} round {number + 1}: {name} {rates[name][-1]:.1f}/s ({load()})")
    return rates


@contextlib.contextmanager
def _others_stopped(pids: Iterable[int]) -> Iterator[None]:
    """These processes and all they started take no time during the block."""
    family = [psutil.Process(pid) for pid in pids]
    family += [child for process in list(family) for child in process.children(recursive=True)]
    for process in family:
        process.suspend()
    try:
        yield
    finally:
        for process in family:
            process.resume()


@contextlib.contextmanager
def _service(setup: Setup, folder: Path) -> Iterator[Stand]:
    with stand(
        engine="vllm",
        models=(_as_folder_name(setup, folder),),
        slots=setup.slots,
        max_num_batched_tokens=setup.budget,
        max_model_len=setup.model_len,
        kv_cache_bytes=setup.kv_bytes,
        dtype=setup.dtype,
        engine_args=dict(setup.further),
        instance="bench-0",
    ) as site:
        for name in ("scheduler", "files", "worker"):
            site.start(name)
        wait_until(lambda: _ready(site), "the worker", 300, every_s=0.5)
        yield site


def _ready(site: Stand) -> bool:
    return any(view.state is InstanceState.READY for view in site.store.instances())


def _as_folder_name(setup: Setup, folder: Path) -> str:
    """A folder with the name requests use: a folder is served under its own name."""
    link = folder / "models" / setup.name
    link.parent.mkdir(exist_ok=True)
    if not link.exists():
        link.mkdir()
        for file in Path(setup.model).iterdir():
            (link / file.name).symlink_to(file.resolve())
    return str(link)


def _one_batch(site: Stand, source: Path, target: Path) -> float:
    """Seconds from the file's submission until its output is written."""
    file_id = new_id(FILE)
    spool = site.settings.data_dir / file_id
    shutil.copyfile(source, spool)
    record = FileRecord(
        id=file_id,
        tenant=TENANT,
        purpose=FilePurpose.BATCH,
        filename=source.name,
        bytes=spool.stat().st_size,
        sha256="",
        blob_key=f"files/{file_id}",
        created_at=site.store.now(),
    )
    blobs = open_blobs(site.settings)
    blobs.adopt(record.blob_key, str(spool))
    site.store.add_file(record)
    batch_id = new_id(BATCH)
    spec = BatchSpec(
        tenant=TENANT,
        endpoint=CHAT,
        input_file_id=record.id,
        completion_window="24h",
        window_s=86_400.0,
    )
    began = time.monotonic()
    site.store.create_batch(batch_id, spec)
    wait_until(
        lambda: site.store.batch(TENANT, batch_id).state.value in ("completed", "failed"),
        "batch",
        3600,
    )
    seconds = time.monotonic() - began
    batch = site.store.batch(TENANT, batch_id)
    require(batch.output_file_id is not None, f"{batch.state}: {batch.errors}")
    output = site.store.file(TENANT, str(batch.output_file_id))
    with blobs.open(output.blob_key) as file:
        target.write_bytes(file.read())
    return seconds


def _check(output: bytes, lines: int, setup: Setup) -> None:
    rows = [orjson.loads(line) for line in output.splitlines()]
    require({row["custom_id"] for row in rows} == set(map(str, range(lines))), "lines are missing")
    require(len(rows) == lines, f"{len(rows)} rows for {lines} lines")
    for row in rows:
        response = row["response"]
        require(response["status_code"] == 200, str(row))
        require(isinstance(response["body"]["choices"][0]["message"]["content"], str), str(row))
        found = response["body"]["usage"]["completion_tokens"]
        require(found == setup.max_tokens, f"{found} tokens, not {setup.max_tokens}")


if __name__ == "__main__":
    main()
