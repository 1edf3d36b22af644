"""What the service costs a lone user, against vLLM's own server over the same model.

Both stand on this machine with equal settings and are asked in turn, block by block, so that a
drift of the machine favours nobody. Compared are medians of the time to the first token and of the
tokens a second of one stream.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Not this folder first: its queue.py would hide the standard library's.
sys.path[0] = str(ROOT)

import aiohttp
import orjson

from benchmarks.interactive_load import TOKENS, Seen, ask, body
from benchmarks.support import CHAT, finish, load, require, say, stand
from benchmarks.vllm_server import vllm_server

SLOTS = 32
BUDGET = 2048
MODEL_LEN = 1024
KV_BYTES = 256 * 1024**2
LONG_TOKENS = 200
REST_S = 2.0
"""An engine looks for work without a pause for a second after its last; the other one waits."""


def main() -> None:
    """Print the medians of both and what lies between them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--short", type=int, default=25, help="requests of a block for TTFT")
    parser.add_argument("--long", type=int, default=3, help="long streams of a block")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qlm-overhead-") as name:
        folder = Path(name)
        model = folder / "compute"
        make = [sys.executable, str(ROOT / "tools/tiny_model/compute_bound.py"), str(model)]
        subprocess.run([*make, "--layers", "8", "--hidden", "512"], check=True, stdout=sys.stderr)
        arguments = {
            "model": str(model),
            "served_model_name": model.name,
            "dtype": "float32",
            "max_num_seqs": SLOTS,
            "max_num_batched_tokens": BUDGET,
            "max_model_len": MODEL_LEN,
            "kv_cache_memory_bytes": KV_BYTES,
            "scheduling_policy": "priority",
            "enforce_eager": True,
        }
        with (
            stand(
                engine="vllm",
                models=(str(model),),
                slots=SLOTS,
                max_num_batched_tokens=BUDGET,
                max_model_len=MODEL_LEN,
                kv_cache_bytes=KV_BYTES,
                dtype="float32",
                instance="bench-0",
            ) as site,
            vllm_server(arguments, folder / "vllm.log") as url,
        ):
            for process in ("api", "scheduler", "worker"):
                site.start(process)
            ours = f"http://{site.settings.host}:{site.settings.port}"
            headers = {"authorization": f"Bearer {site.key}"}
            finish(asyncio.run(_compare({"service": ours, "vllm": url}, headers, options)))


async def _compare(
    urls: dict[str, str], headers: dict[str, str], options: argparse.Namespace
) -> dict[str, object]:
    first: dict[str, list[float]] = {name: [] for name in urls}
    rates: dict[str, list[float]] = {name: [] for name in urls}
    async with aiohttp.ClientSession(headers=headers) as session:
        for url in urls.values():
            await _until_served(session, url)
        for number in range(options.rounds):
            order = list(urls) if number % 2 else list(urls)[::-1]
            for name in order:
                await asyncio.sleep(REST_S)
                await _ask(session, urls[name], 0)
                for at in range(options.short):
                    seen = await _ask(session, urls[name], 1000 * number + at)
                    first[name].append(_known(seen.ttft_s, seen))
                for at in range(options.long):
                    seen = await _ask(session, urls[name], 90_000 + at, LONG_TOKENS)
                    # Seen counts on TOKENS in a stream.
                    took = _known(seen.tpot_s, seen) * (TOKENS - 1)
                    rates[name].append((LONG_TOKENS - 1) / took)
            say(f"round {number + 1}: {_medians(first)} s, {_medians(rates)} tokens/s ({load()})")
    ttft, rate = _medians(first), _medians(rates)
    return {
        "ttft_p50": ttft,
        "ttft_over_s": round(ttft["service"] - ttft["vllm"], 4),
        "tokens_per_s": rate,
        "tokens_per_s_lost": round(1 - rate["service"] / rate["vllm"], 4),
    }


async def _ask(session: aiohttp.ClientSession, url: str, number: int, tokens: int = TOKENS) -> Seen:
    wanted = body("compute", number) | {"max_tokens": tokens}
    return await ask(session, f"{url}{CHAT}", orjson.dumps(wanted))


async def _until_served(session: aiohttp.ClientSession, url: str) -> None:
    give_up_at = time.monotonic() + 240
    while (seen := await _ask(session, url, 0)).ttft_s is None:
        require(time.monotonic() < give_up_at, f"not served: {seen.fault}")
        await asyncio.sleep(1.0)


def _known(seconds: float | None, seen: Seen) -> float:
    require(seconds is not None, seen.fault)
    assert seconds is not None
    return seconds


def _medians(found: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(statistics.median(values), 4) for name, values in found.items()}


if __name__ == "__main__":
    main()
