"""What is broken, and in which order: a pure function of the seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

WORKERS = ("gpu-0", "gpu-1")
SCHEDULERS = ("scheduler-1", "scheduler-2")
PROCESSES = ("api", *SCHEDULERS, "files", "callbacks", *WORKERS)

FAILPOINTS = {
    "flush": (
        ("flush.before_commit=exit@{n}", WORKERS),
        ("flush.after_commit=exit@{n}", WORKERS),
        ("flush.after_commit=raise%0.2", WORKERS),
        ("flush.before_commit=sleep:0.5%0.2", WORKERS),
        ("claim_slices.before_commit=exit@{few}", WORKERS),
        ("claim_slices.after_commit=exit@{few}", WORKERS),
        ("claim_slices.after_commit=raise%0.3", WORKERS),
        ("heartbeat.after_commit=raise%0.5", WORKERS),
    ),
    "files": (
        ("intake.chunk=exit@{few}", ("files",)),
        ("load_lines.before_commit=exit@1", ("files",)),
        ("load_lines.after_commit=exit@1", ("files",)),
        ("load_lines.after_commit=raise%0.5", ("files",)),
        ("export.file_written=exit@1", ("files",)),
        ("finish_export.before_commit=exit@1", ("files",)),
        ("finish_export.after_commit=exit@1", ("files",)),
        ("finish_export.after_commit=raise%0.5", ("files",)),
        ("blob.write=full%0.5", ("files",)),
    ),
    "outbox": (
        ("outbox.sent=exit@1", ("callbacks",)),
        ("outbox.sent=exit@{few}", ("callbacks",)),
        ("record_delivery.before_commit=exit@1", ("callbacks",)),
        ("claim_outbox.after_commit=exit@1", ("callbacks",)),
    ),
    "plan": (
        ("save_plan.before_commit=exit@{few}", SCHEDULERS),
        ("save_plan.after_commit=exit@{few}", SCHEDULERS),
        ("save_plan.before_commit=sleep:5@{few}", SCHEDULERS),
        ("assign.before_commit=exit@{few}", SCHEDULERS),
        ("assign.after_commit=exit@{few}", SCHEDULERS),
        ("reap.before_commit=sleep:4@{few}", SCHEDULERS),
    ),
    "api": (
        ("create_batch.after_commit=exit@1", ("api",)),
        ("add_file.after_commit=exit@1", ("api",)),
        ("add_interactive.after_commit=exit@{n}", ("api",)),
    ),
}
"""Places in the code, and who runs into them; {n} and {few} are drawn."""

KINDS = {
    "kill": 4,
    "storm": 4,
    "stop": 3,
    "term": 2,
    "quit": 1,
    "postgres-crash": 3,
    "postgres-backend": 2,
    "postgres-immediate": 2,
    "postgres-outage": 1,
    "postgres-cut": 2,
    "redis-kill": 1,
    "redis-empty": 1,
    "redis-flush": 1,
    "both": 2,
    "failpoint": 6,
    "clock": 1,
    "full-blobs": 1,
    "full-postgres": 1,
    "receiver-dead": 1,
    "engine-hangs": 1,
    "engine-dies": 2,
    "leader-killed": 1,
    "leader-stopped": 1,
    "join-and-leave": 2,
    "upgrade": 1,
    "poison": 1,
}
"""Every kind of fault, and how often it is in the deck that is dealt again and again."""

SECONDS = {
    "stop": (6.5, 8.0),
    "leader-stopped": (4.5, 6.0),
    "postgres-crash": (0.0, 2.0),
    "postgres-immediate": (0.0, 1.0),
    "postgres-outage": (7.0, 9.0),
    "redis-kill": (0.0, 3.0),
    "redis-empty": (0.0, 3.0),
    "both": (0.0, 2.0),
    "full-blobs": (3.0, 5.0),
    "full-postgres": (3.0, 5.0),
    "receiver-dead": (4.0, 8.0),
    "join-and-leave": (4.0, 8.0),
}
"""How long a fault lasts, for those that last."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is broken. `detail` is a failpoint; `seconds` is how long it stays so."""

    kind: str
    targets: tuple[str, ...] = ()
    seconds: float = 0.0
    detail: str = ""
    pause_s: float = 0.0
    """Quiet time afterwards."""

    def __str__(self) -> str:
        lasting = f" for {self.seconds:.1f} s" if self.seconds else ""
        return " ".join(filter(None, (self.kind, *self.targets, self.detail))) + lasting


def plan(seed: int, faults: int) -> list[Fault]:
    """So many faults. The first deck holds each kind once, the others each as often as KINDS."""
    draw = random.Random(f"chaos/{seed}")
    dealt: list[str] = []
    while len(dealt) < faults:
        deck = list(KINDS) if not dealt else [k for k, times in KINDS.items() for _ in range(times)]
        draw.shuffle(deck)
        dealt += deck
    return [_fault(kind, draw) for kind in dealt[:faults]]


def _fault(kind: str, draw: random.Random) -> Fault:
    targets: tuple[str, ...] = ()
    detail = ""
    match kind:
        case "kill" | "stop" | "term":
            targets = (draw.choice(PROCESSES),)
        case "storm":
            targets = tuple(sorted(draw.sample(PROCESSES, draw.randint(3, 5))))
        case "quit" | "clock" | "engine-hangs" | "engine-dies":
            targets = (draw.choice(WORKERS),)
        case "failpoint":
            template, holders = draw.choice(FAILPOINTS[draw.choice(sorted(FAILPOINTS))])
            targets = (draw.choice(holders),)
            detail = template.format(n=draw.randint(5, 60), few=draw.randint(1, 6))
    low, high = SECONDS.get(kind, (0.0, 0.0))
    seconds = round(draw.uniform(low, high), 1)
    return Fault(kind, targets, seconds, detail, pause_s=round(draw.uniform(0.2, 1.5), 1))
