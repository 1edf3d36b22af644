"""Logs of the scheduler, asked again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qlm_batch.control.recording import ArrivalEntry, PlanEntry, Recorder, read_log
from qlm_batch.domain.errors import InvalidInput
from qlm_batch.domain.jobs import SloClass
from qlm_batch.domain.snapshot import Snapshot
from qlm_batch.scheduling.policies import policy
from qlm_batch.simulation.cluster import Cluster, SimulationConfig
from qlm_batch.simulation.replay import replay
from qlm_batch.simulation.workload import WorkClass
from tests.simulation.cases import arrival, batch_class, fleet, workload

MODELS = ("m", "n")


def _log(path: Path, name: str = "qlm") -> Path:
    arrivals = [
        arrival(3.0 * n, n % 2, lines=40, model=MODELS[n % 3 == 0], output=20 + n)
        for n in range(12)
    ]
    work = workload((batch_class(20.0), batch_class(90.0, "late")), arrivals, 40.0)
    with Recorder(path) as recorder:
        Cluster(
            fleet(2, MODELS), work, policy(name), SimulationConfig(drain_s=300.0), recorder
        ).run()
    return path


@pytest.mark.parametrize("name", ["qlm", "edf-shed"])
def test_a_logs_plans_come_back_byte_for_byte(tmp_path: Path, name: str) -> None:
    told = replay(_log(tmp_path / "log.jsonl.gz", name))
    assert told.plans == told.same > 3
    assert told.different is None and told.skipped == 0


def test_a_log_that_does_not_tell_what_was_cut_says_the_same(tmp_path: Path) -> None:
    path, older = _log(tmp_path / "log.jsonl"), tmp_path / "older" / "log.jsonl"
    older.parent.mkdir()
    lines = path.read_text().splitlines(keepends=True)
    older.write_text(
        "".join(
            line.replace(",false]", "]") if '"type":"lengths"' in line else line for line in lines
        )
    )
    assert older.stat().st_size < path.stat().st_size
    told, now = replay(older), replay(path)
    assert told.plans == told.same == now.same > 3
    for one, other in zip(told.history.arrivals, now.history.arrivals, strict=True):
        assert one.outputs.tolist() == other.outputs.tolist()


def test_a_changed_plan_is_noticed(tmp_path: Path) -> None:
    path = _log(tmp_path / "log.jsonl")
    text = path.read_text()
    path.write_text(text.replace('"seed":0,"plan":{"made_at":1', '"seed":0,"plan":{"made_at":2', 1))
    told = replay(path)
    assert told.same == told.plans - 1
    assert told.different is not None


def test_the_history_holds_the_calls_with_their_times_and_targets(tmp_path: Path) -> None:
    calls = [arrival(0.5 * n, 0, output=5 + n, tenant="u") for n in range(20)]
    batches = [arrival(1.0, 1, lines=30)]
    classes = (WorkClass("chat", SloClass.INTERACTIVE, 2.0), batch_class(90.0))
    path = tmp_path / "log.jsonl"
    with Recorder(path) as recorder:
        work = workload(classes, sorted([*calls, *batches], key=lambda each: each.at), 10.0)
        Cluster(fleet(1), work, policy("qlm"), SimulationConfig(drain_s=60.0), recorder).run()
    history = replay(path).history
    assert [(c.kind, c.target_s) for c in history.classes] == [
        (SloClass.INTERACTIVE, 2.0),
        (SloClass.BATCH, 90.0),
    ]
    found = [a for a in history.arrivals if a.work_class == 0]
    assert [(a.tenant, a.prompts.tolist(), a.outputs.tolist()) for a in found] == [
        (a.tenant, a.prompts.tolist(), a.outputs.tolist()) for a in calls
    ]
    assert [a.at for a in found] == pytest.approx([a.at for a in calls])
    assert sum(len(a.prompts) for a in history.arrivals if a.work_class == 1) == 30


def test_the_history_holds_what_was_asked_and_the_lengths_it_had(tmp_path: Path) -> None:
    history = replay(_log(tmp_path / "log.jsonl")).history
    assert sum(len(a.prompts) for a in history.arrivals) == 12 * 40
    assert [c.target_s for c in history.classes] == [20.0, 90.0]
    outputs = np.concatenate([a.outputs for a in history.arrivals])
    assert set(outputs.tolist()) <= set(range(20, 32))
    prompts = np.concatenate([a.prompts for a in history.arrivals])
    assert set(prompts.tolist()) == {100}
    outcome = Cluster(fleet(3, MODELS), history, policy("edf-shed"), SimulationConfig()).run()
    assert outcome.requests.on_time.mean() > 0.9


def test_a_log_names_work_once_and_holds_no_bodies(tmp_path: Path) -> None:
    path = _log(tmp_path / "log.jsonl")
    entries = list(read_log(path))
    runs = [(e.run.run_id, e.run.generation) for e in entries if isinstance(e, ArrivalEntry)]
    assert len(runs) == len(set(runs)) == 12
    assert any(isinstance(entry, PlanEntry) for entry in entries)
    assert "body" not in path.read_text()


def test_a_log_cut_off_in_the_middle_of_a_line_is_read_up_to_there(tmp_path: Path) -> None:
    path = _log(tmp_path / "log.jsonl")
    whole = len(list(read_log(path)))
    path.write_bytes(path.read_bytes()[:-40])
    assert len(list(read_log(path))) == whole - 1


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"type": "song"}\n')
    with pytest.raises(InvalidInput, match="no log"):
        replay(path)
    path.write_text("")
    with pytest.raises(InvalidInput, match="no work"):
        replay(path)


def test_a_log_carried_on_by_another_process_names_its_work_once(tmp_path: Path) -> None:
    path = _log(tmp_path / "log.jsonl")
    arrivals = [e for e in read_log(path) if isinstance(e, ArrivalEntry)]
    before = path.read_bytes()
    with Recorder(path, append=True) as recorder:
        recorder.saw(Snapshot(0.0, (arrivals[0].run,), ()))
    assert path.read_bytes().startswith(before) and path.read_bytes() != before
    assert len(replay(path).history.arrivals) == 12
