"""`python -m tests.chaos --seed 7 --minutes 20`: break the service, and prove that nothing is lost.

What happens is told on standard error; the last line of the output is JSON. The exit status is 0
when every invariant held. With --keep the folder stays, logs and all.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from tests.chaos.driver import MOST_FAULTS, Order, run
from tests.chaos.faults import complain
from tests.chaos.schedule import plan
from tests.chaos.site import MOUNTS

SHOWN = 20


def main() -> int:
    """Run once."""
    given = _arguments()
    _with_own_mounts()
    complain(f"seed {given.seed}; the first faults of its schedule:")
    for fault in plan(given.seed, MOST_FAULTS)[:12]:
        complain(f"  {fault}")
    folder = Path(tempfile.mkdtemp(prefix="qlm-chaos-"))
    order = Order(
        seed=given.seed,
        seconds=60 * given.minutes,
        lanes=given.lanes,
        most_lines=given.lines,
        real_requests=given.real_requests,
        real_kills=given.real_kills,
    )
    try:
        outcome = run(order, folder, _enough())
        for name, evidence in outcome.broken.items():
            complain(f"BROKEN {name}: {len(evidence)} times")
            for each in evidence[:SHOWN]:
                complain(f"    {each}")
        if not outcome.broken:
            complain("every invariant held")
        if given.keep or outcome.broken:
            complain(f"logs are in {folder / 'logs'}")
        print(json.dumps(outcome.figures), flush=True)
        return 1 if outcome.broken else 0
    finally:
        if not given.keep:
            shutil.rmtree(folder, ignore_errors=True)


def _enough() -> threading.Event:
    """Set by the first Ctrl-C; a second one ends the run at once."""
    enough = threading.Event()

    def handle(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        complain("enough is broken; Ctrl-C again to leave at once")
        enough.set()

    signal.signal(signal.SIGINT, handle)
    return enough


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1.0, help="of faults, simulated engines")
    parser.add_argument("--lanes", type=int, default=1, help="batches of each tenant at a time")
    parser.add_argument("--lines", type=int, default=400, help="most lines of a batch")
    parser.add_argument("--real-requests", type=int, default=0, help="afterwards, on real vLLM")
    parser.add_argument("--real-kills", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="keep logs and data")
    return parser.parse_args()


def _with_own_mounts() -> None:
    """Begin anew with mounts of this run's own, for disks that can be full, where allowed."""
    unshare = shutil.which("unshare")
    if MOUNTS in os.environ or os.geteuid() != 0 or unshare is None:
        return
    alone = [unshare, "--mount", "--propagation", "private"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode == 0:
        os.environ[MOUNTS] = "1"
        os.execv(unshare, [*alone, sys.executable, "-m", "tests.chaos", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
