"""Requests a second of real vLLM through the service, through run-batch, and through LLM.chat.

All three take the same file, model, type, slots and token budget, in turn, several rounds over. The
rate is the marginal one, from the times of a small and a large file, so that starting drops out.
Every output is parsed and its tokens are counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Not this folder first: its queue.py would hide the standard library's.
sys.path[0] = str(ROOT)

import orjson

from benchmarks.support import CHAT, TENANT, Stand, finish, load, require, say, stand, wait_until
from qlm_batch.bootstrap import open_blobs
from qlm_batch.domain.jobs import BatchSpec, FilePurpose, FileRecord
from qlm_batch.ids import BATCH, FILE, new_id
from qlm_batch.models import tiny_model_path

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

    def write(self, path: Path, lines: int) -> None:
        """The input file: prompts that share nothing, answers of equal length."""
        with path.open("wb") as file:
            for number in range(lines):
                file.write(orjson.dumps(self._line(number)) + b"\n")

    def _line(self, number: int) -> dict[str, object]:
        words = " ".join(WORDS[(number * 7 + n * n) % len(WORDS)] for n in range(16))
        body = {
            "model": self.name,
            "messages": [{"role": "user", "content": f"{number} {words}"}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        return {"custom_id": str(number), "method": "POST", "url": CHAT, "body": body}

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
        }


def main() -> None:
    """Print the median rates of each contender on each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["tiny", "compute"])
    parser.add_argument("--sizes", type=int, nargs=2, metavar=("SMALL", "LARGE"))
    parser.add_argument("--llm-chat", nargs=3, metavar=("SETUP", "IN", "OUT"), help="internal")
    options = parser.parse_args()
    if options.llm_chat:
        _llm_chat(*options.llm_chat)
        return
    result: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="qlm-throughput-") as folder:
        for name in ("tiny", "compute"):
            if options.only in (None, name):
                setup = _setup(name, Path(folder), options.sizes)
                result[name] = _compare(setup, Path(folder), options.rounds)
    finish(result)


def _setup(name: str, folder: Path, sizes: list[int] | None) -> Setup:
    if name == "tiny":
        return Setup("tiny", str(tiny_model_path()), tuple(sizes or (500, 3_000)))  # type: ignore[arg-type]
    path = folder / "compute"
    make = [sys.executable, str(ROOT / "tools/tiny_model/compute_bound.py"), str(path)]
    subprocess.run([*make, "--layers", "8", "--hidden", "512"], check=True, stdout=sys.stderr)
    return Setup("compute", str(path), tuple(sizes or (64, 384)))  # type: ignore[arg-type]


def _compare(setup: Setup, folder: Path, rounds: int) -> Mapping[str, float]:
    contenders: dict[str, Callable[[Setup, Path], tuple[float, float]]] = {
        "service": _service,
        "run_batch": lambda setup, folder: _processes(setup, folder, _run_batch),
        "llm_chat": lambda setup, folder: _processes(setup, folder, _llm_chat_process),
    }
    small, large = setup.sizes
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        # Each round begins with another one, so that a drift of the machine favours nobody.
        order = list(contenders)[number % 3 :] + list(contenders)[: number % 3]
        for name in order:
            short_s, long_s = contenders[name](setup, folder)
            rate = (large - small) / (long_s - short_s)
            rates[name].append(rate)
            say(f"{setup.name} round {number + 1}: {name} {rate:.1f} requests/s ({load()})")
    return {name: round(statistics.median(found), 1) for name, found in rates.items()}


def _service(setup: Setup, folder: Path) -> tuple[float, float]:
    with stand(
        engine="vllm",
        models=(_as_folder_name(setup, folder),),
        slots=setup.slots,
        max_num_batched_tokens=setup.budget,
        max_model_len=setup.model_len,
        kv_cache_bytes=setup.kv_bytes,
        dtype=setup.dtype,
        instance="bench-0",
    ) as site:
        for name in ("scheduler", "files", "worker"):
            site.start(name)
        times = [_one_batch(site, setup, lines) for lines in (16, *setup.sizes)]
    return times[1], times[2]


def _as_folder_name(setup: Setup, folder: Path) -> str:
    """A folder with the name requests use: a folder is served under its own name."""
    link = folder / "models" / setup.name
    link.parent.mkdir(exist_ok=True)
    if not link.exists():
        link.mkdir()
        for file in Path(setup.model).iterdir():
            (link / file.name).symlink_to(file.resolve())
    return str(link)


def _one_batch(site: Stand, setup: Setup, lines: int) -> float:
    """Seconds from the file's submission until its output is written."""
    path = site.settings.data_dir / f"{lines}.jsonl"
    setup.write(path, lines)
    record = FileRecord(
        id=new_id(FILE),
        tenant=TENANT,
        purpose=FilePurpose.BATCH,
        filename=path.name,
        bytes=path.stat().st_size,
        sha256="",
        blob_key=f"files/{path.name}",
        created_at=site.store.now(),
    )
    blobs = open_blobs(site.settings)
    blobs.adopt(record.blob_key, str(path))
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
        _check(file.read(), lines, setup)
    return seconds


def _processes(
    setup: Setup, folder: Path, run: Callable[[Setup, Path, Path], None]
) -> tuple[float, float]:
    times = []
    for lines in setup.sizes:
        source, target = folder / "in.jsonl", folder / "out.jsonl"
        target.unlink(missing_ok=True)
        setup.write(source, lines)
        began = time.monotonic()
        run(setup, source, target)
        times.append(time.monotonic() - began)
        _check(target.read_bytes(), lines, setup)
    return times[0], times[1]


def _run_batch(setup: Setup, source: Path, target: Path) -> None:
    options = []
    for name, value in setup.engine_args().items():
        options += [f"--{name.replace('_', '-')}", str(value)]
    module = "vllm.entrypoints.launchers.run_batch"
    _quietly([sys.executable, "-m", module, "-i", str(source), "-o", str(target), *options])


def _llm_chat_process(setup: Setup, source: Path, target: Path) -> None:
    given = json.dumps({**setup.engine_args(), "max_tokens": setup.max_tokens})
    _quietly([sys.executable, __file__, "--llm-chat", given, str(source), str(target)])


def _llm_chat(given: str, source: str, target: str) -> None:
    """Inside a process of its own: all prompts in one call."""
    from vllm import LLM, SamplingParams

    engine = json.loads(given)
    tokens = engine.pop("max_tokens")
    lines = [orjson.loads(line) for line in Path(source).read_bytes().splitlines()]
    llm = LLM(**engine)
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    answers = llm.chat([line["body"]["messages"] for line in lines], sampling, use_tqdm=False)
    with Path(target).open("wb") as file:
        for line, answer in zip(lines, answers, strict=True):
            (made,) = answer.outputs
            body = {
                "choices": [{"message": {"content": made.text}}],
                "usage": {"completion_tokens": len(made.token_ids)},
            }
            response = {"status_code": 200, "body": body}
            file.write(orjson.dumps({"custom_id": line["custom_id"], "response": response}) + b"\n")


def _quietly(command: list[str]) -> None:
    done = subprocess.run(
        command, env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}, capture_output=True, check=False
    )
    require(done.returncode == 0, done.stderr.decode()[-2000:])


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
