"""The rig's own checks: they pass what is right, and find what is not."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import orjson
import pytest

from qlm_batch.domain.engine import EngineRequest
from qlm_batch.domain.jobs import CHAT, EngineKind
from qlm_batch.settings import Settings
from qlm_batch.store.memory import MemoryStore
from qlm_workers import app
from qlm_workers.simulated_engine import SimulatedEngine
from tests.chaos.answers import body_of, expected, said
from tests.chaos.batches import Line, Sent, Tally
from tests.chaos.invariants import recomputed
from tests.chaos.worker import NOTE, MisbehavingEngine


def row(custom_id: str, text: str = "yes", error: str | None = None) -> dict[str, Any]:
    body = {"choices": [{"message": {"content": text}}]}
    if error is not None:
        return {"custom_id": custom_id, "response": None, "error": {"code": error}}
    return {"custom_id": custom_id, "response": {"status_code": 200, "body": body}, "error": None}


def checked(outputs: list[Any], errors: list[Any], *, counts: tuple[int, int, int]) -> Tally:
    lines = {name: Line({}, "yes") for name in ("a", "b")}
    sent = Sent("batch", {**lines, "p": Line({}, "", error="engine_crashed")})
    tally = Tally()
    names = ("total", "completed", "failed")
    tally.add(sent, outputs, errors, {"request_counts": dict(zip(names, counts, strict=True))})
    return tally


GOOD = [row("a"), row("b")]
POISON = [row("p", error="engine_crashed")]


def test_a_batch_as_it_should_be_passes() -> None:
    tally = checked(GOOD, POISON, counts=(3, 2, 1))
    assert (tally.requests, tally.right, tally.poisoned) == (3, 2, 1)
    found = (tally.lost, tally.duplicated, tally.wrong, tally.non_poison_errors, tally.faults)
    assert found == ([], [], [], [], [])


@pytest.mark.parametrize(
    ("outputs", "errors", "counts", "finding"),
    [
        ([row("a")], POISON, (3, 1, 1), "lost"),
        ([*GOOD, row("a")], POISON, (3, 3, 1), "duplicated"),
        (GOOD, [*POISON, row("a", error="engine_crashed")], (3, 2, 2), "duplicated"),
        ([row("a"), row("b", "no")], POISON, (3, 2, 1), "wrong"),
        ([row("a")], [*POISON, row("b", error="engine_error")], (3, 1, 2), "non_poison_errors"),
        ([*GOOD, row("p")], [], (3, 3, 0), "faults"),
        ([*GOOD, row("x")], POISON, (3, 3, 1), "faults"),
        (GOOD, POISON, (3, 1, 2), "faults"),
    ],
)
def test_what_is_wrong_with_a_batch_is_found(
    outputs: list[Any], errors: list[Any], counts: tuple[int, int, int], finding: str
) -> None:
    assert getattr(checked(outputs, errors, counts=counts), finding)


def test_an_answer_counts_as_computed_again_when_it_was_begun_after_one_was_there(
    tmp_path: Path,
) -> None:
    notes = tmp_path / "answers"
    twice, together, once = (1, 0.0, 1.0), (2, 0.0, 2.0), (3, 0.0, 1.0)
    written = [twice, (1, 5.0, 6.0), together, (2, 1.0, 3.0), once]
    torn = struct.pack("<Q", 9)
    notes.write_bytes(b"".join(NOTE.pack(*note) for note in written) + torn)
    assert recomputed(notes) == (3, 1)


async def test_the_answer_expected_is_the_one_the_engine_gives() -> None:
    engine = SimulatedEngine("sim", EngineKind.GENERATE, time_scale=0)
    await engine.start()
    body = body_of("what about it?", 17)
    request = EngineRequest("r", CHAT, orjson.dumps(body).decode(), 0, "")
    answer = await engine.answer(request)
    assert said(orjson.loads(answer.body)) == expected(body)
    await engine.stop()


async def test_the_workers_of_the_rig_have_the_engine_that_misbehaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(app, "make_engine", MisbehavingEngine.from_settings)
    settings = Settings(engine="simulated", models=("sim",), redis_url="redis://127.0.0.1:1/0")
    runner = app.make_runner(settings, MemoryStore(lambda: 0.0), "boot")
    (host,) = runner._hosts.values()
    assert isinstance(host.engine, MisbehavingEngine)
