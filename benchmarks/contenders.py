"""vLLM's own ways to run a file, each in a process of its own: run-batch and LLM.chat.

`python benchmarks/contenders.py NAME ENGINE_ARGUMENTS TOKENS` starts one engine. Then it runs each
file named on standard input, `[input, output]` in JSON, and prints the seconds that took.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[1]
# Not this folder first: its queue.py would hide the standard library's.
sys.path[0] = str(ROOT)

import orjson
import psutil

READY, SECONDS = "ready", "seconds "


class Contender:
    """A process that runs files one way; its engine starts with it."""

    def __init__(self, name: str, engine: dict[str, object], max_tokens: int, log: Path) -> None:
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, __file__, name, json.dumps(engine), str(max_tokens)],
                env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._said(READY)

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def run(self, source: Path, target: Path) -> float:
        """Seconds that the file `source` took."""
        assert self._process.stdin is not None
        print(json.dumps([str(source), str(target)]), file=self._process.stdin, flush=True)
        return float(self._said(SECONDS))

    def stop(self) -> None:
        """End it and its engine."""
        process = psutil.Process(self.pid)
        for each in (*process.children(recursive=True), process):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        self._process.wait()

    def _said(self, word: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        raise SystemExit(f"a contender ended:\n{self._log.read_text()[-2000:]}")


def run_batch(engine: dict[str, object], given: IO[str]) -> None:
    """`vllm run-batch`, its engine started once."""
    try:
        from vllm.entrypoints.launchers import run_batch as launcher
        from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    except ImportError:
        # Where they were up to 0.27 or so.
        from vllm.entrypoints.openai import run_batch as launcher
        from vllm.entrypoints.openai.api_server import build_async_engine_client
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    flags = ["-i", "-", "-o", "-"]
    for name, value in engine.items():
        flag = f"--{name.replace('_', '-')}"
        flags += [flag] if value is True else [flag, str(value)]
    args = launcher.make_arg_parser(FlexibleArgumentParser()).parse_args(flags)

    async def main() -> None:
        async with build_async_engine_client(
            args, usage_context=UsageContext.OPENAI_BATCH_RUNNER
        ) as client:
            print(READY, flush=True)
            while line := await asyncio.to_thread(given.readline):
                args.input_file, args.output_file = json.loads(line)
                launcher.validate_run_batch_args(args)
                began = time.monotonic()
                await launcher.run_batch(client, args)
                print(f"\n{SECONDS}{time.monotonic() - began}", flush=True)

    asyncio.run(main())


def llm_chat(engine: dict[str, object], max_tokens: int, given: Iterator[str]) -> None:
    """One call of `LLM.chat` with all prompts of a file."""
    from vllm import LLM, SamplingParams

    llm = LLM(**engine)
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    print(READY, flush=True)
    for named in given:
        source, target = json.loads(named)
        began = time.monotonic()
        lines = [orjson.loads(line) for line in Path(source).read_bytes().splitlines()]
        answers = llm.chat([line["body"]["messages"] for line in lines], sampling, use_tqdm=False)
        with Path(target).open("wb") as file:
            for line, answer in zip(lines, answers, strict=True):
                (made,) = answer.outputs
                body = {
                    "choices": [{"message": {"content": made.text}}],
                    "usage": {"completion_tokens": len(made.token_ids)},
                }
                response = {"status_code": 200, "body": body}
                row = {"custom_id": line["custom_id"], "response": response}
                file.write(orjson.dumps(row) + b"\n")
        print(f"\n{SECONDS}{time.monotonic() - began}", flush=True)


def main() -> None:
    """Run the named contender in this process."""
    name, arguments, max_tokens = sys.argv[1:]
    if name == "run_batch":
        run_batch(json.loads(arguments), sys.stdin)
    else:
        llm_chat(json.loads(arguments), int(max_tokens), sys.stdin)


if __name__ == "__main__":
    main()
