"""vLLM's own ways to run a file, each in a process of its own: run-batch and LLM.chat.

`python benchmarks/contenders.py NAME SETUP` starts one engine, runs each file of the setup in turn
and prints the seconds each took, without the start, as one line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Not this folder first: its queue.py would hide the standard library's.
sys.path[0] = str(ROOT)

import orjson


@dataclass(frozen=True)
class Task:
    """vLLM's engine arguments, and the files to run: pairs of input and output."""

    engine: dict[str, object]
    max_tokens: int
    files: Sequence[tuple[str, str]] = field(default_factory=tuple)

    def command(self, name: str) -> list[str]:
        """What runs this task with the contender `name`."""
        return [sys.executable, __file__, name, json.dumps(asdict(self))]


def run_batch(task: Task) -> list[float]:
    """The seconds of `vllm run-batch` on each file, its engine started once."""
    from vllm.entrypoints.launchers import run_batch as launcher
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    given = []
    for name, value in task.engine.items():
        flag = f"--{name.replace('_', '-')}"
        given += [flag] if value is True else [flag, str(value)]
    parser = launcher.make_arg_parser(FlexibleArgumentParser())
    args = parser.parse_args(["-i", task.files[0][0], "-o", task.files[0][1], *given])
    launcher.validate_run_batch_args(args)

    async def main() -> list[float]:
        times = []
        async with build_async_engine_client(
            args, usage_context=UsageContext.OPENAI_BATCH_RUNNER
        ) as client:
            for args.input_file, args.output_file in task.files:
                began = time.monotonic()
                await launcher.run_batch(client, args)
                times.append(time.monotonic() - began)
        return times

    return asyncio.run(main())


def llm_chat(task: Task) -> list[float]:
    """The seconds of one call of `LLM.chat` with all prompts of each file."""
    from vllm import LLM, SamplingParams

    llm = LLM(**task.engine)
    sampling = SamplingParams(temperature=0, max_tokens=task.max_tokens, ignore_eos=True)
    times = []
    for source, target in task.files:
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
                row = {
                    "custom_id": line["custom_id"],
                    "response": {"status_code": 200, "body": body},
                }
                file.write(orjson.dumps(row) + b"\n")
        times.append(time.monotonic() - began)
    return times


def main() -> None:
    """Run the named contender in this process."""
    name, given = sys.argv[1:]
    task = Task(**json.loads(given))
    times = {"run_batch": run_batch, "llm_chat": llm_chat}[name](task)
    print(json.dumps(times), flush=True)


if __name__ == "__main__":
    main()
