"""The round with a real engine: the shipped model under vLLM, killed again and again."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import sys
import threading
import time
from collections.abc import Mapping

import psutil

from qlm_batch.models import TINY_MODEL_NAME
from qlm_batch.models.prompts import chat_body, mixed
from tests.chaos.batches import Follower, Line, Sent, Tally
from tests.chaos.callers import until
from tests.chaos.client import Client
from tests.chaos.faults import complain
from tests.chaos.schedule import WORKERS
from tests.chaos.site import Site

NAME = "gpu-real"
BATCH_LINES = 250
SPARED = ("guardian", "witness", "resource_tracker")
"""Of a worker's processes, those that clear up after the others or tell of their end."""
LEAST_RIGHT = 0.9
"""The share of right answers below which something other than the model is to blame."""


def round(
    site: Site,
    client: Client,
    tally: Tally,
    callbacks: Mapping[str, str],
    seed: int,
    requests: int,
    kills: int,
) -> dict[str, int]:
    """Serve so many requests while the worker, or its engine alone, is killed so many times."""
    for name in WORKERS:
        site.end(name, roughly=False)
    before, killed_before = tally.requests, site.kills
    right_before = tally.right
    site.add(
        NAME,
        [sys.executable, "-m", "qlm_cli", "worker"],
        QLM_ENGINE="vllm",
        QLM_MODELS=json.dumps([TINY_MODEL_NAME]),
        QLM_STALL_S="60",
        QLM_SLOTS="32",
        QLM_START_TIMEOUT_S="300",
    )
    if not until(lambda: TINY_MODEL_NAME in client.call("GET", "/v1/models").text, 300, 0.5):
        tally.faults.append("the real engine did not start")
        return {"requests": 0, "kills": 0}
    batches = _batches(requests, seed)
    threads = [
        threading.Thread(target=Follower(client, tally, callbacks).run, args=(sent,), daemon=True)
        for sent in batches
    ]
    for thread in threads:
        thread.start()
    draw = random.Random(f"real/{seed}")
    for number in range(kills):
        _kill_after(site, (number + 1) * requests // (kills + 1), draw, tally)
    for thread in threads:
        thread.join(900)
    if any(thread.is_alive() for thread in threads):
        tally.faults.append("batches on the real engine did not end")
    served, right = tally.requests - before, tally.right - right_before
    complain(f"real vLLM: {right} of {served} answers right")
    if right < LEAST_RIGHT * served:
        tally.wrong.append(f"only {right} of {served} answers of the real engine are right")
    return {"requests": served, "kills": site.kills - killed_before}


def _batches(requests: int, seed: int) -> list[Sent]:
    prompts = mixed(requests, seed)
    made = []
    for first in range(0, requests, BATCH_LINES):
        lines = {
            f"real-{first + n}": Line(chat_body(prompt, max_tokens=400), prompt.answer)
            for n, prompt in enumerate(prompts[first : first + BATCH_LINES])
        }
        made.append(Sent(f"real{first}", lines, check=False))
    return made


def _kill_after(site: Site, stored: int, draw: random.Random, tally: Tally) -> None:
    """Wait until so many results are stored, and kill the worker or what computes for it."""

    def reached() -> bool:
        with site.connect() as connection:
            row = connection.execute(
                "SELECT count(*) FROM result WHERE instance = %s", (NAME,)
            ).fetchone()
        return row is not None and int(str(row[0])) >= stored

    if not until(reached, 300, 0.2):
        tally.faults.append(f"the real engine did not get to {stored} results")
        return
    until(lambda: site.pid(NAME) is not None, 30)
    pid = site.pid(NAME)
    if draw.random() < 0.3 and pid is not None:
        complain(f"{stored} stored: killing the real engine's processes")
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(pid).children():
                if not any(name in " ".join(child.cmdline()) for name in SPARED):
                    child.kill()
        site.kills += 1
        until(lambda: site.pid(NAME) != pid, 60)
    else:
        complain(f"{stored} stored: killing the real worker")
        site.signal(NAME, signal.SIGKILL)
    time.sleep(0.5)
