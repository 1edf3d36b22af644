"""The log of a scheduler that the service keeps."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from qlm_batch.bootstrap import open_recorder
from qlm_batch.control.recording import ArrivalEntry, PlanEntry, Recorder, read_log
from qlm_batch.domain.errors import ConfigurationError
from qlm_batch.domain.snapshot import Plan
from qlm_batch.scheduling.estimator import EstimatorConfig
from qlm_batch.settings import load_settings
from tests.unit.planning_cases import run_view, snapshot


def test_nothing_is_kept_unless_asked() -> None:
    assert open_recorder(load_settings(record=None)) is None


def test_a_log_that_cannot_be_written_is_named_with_the_remedy(tmp_path: Path) -> None:
    settings = load_settings(record=tmp_path / "absent" / "log.jsonl")
    with pytest.raises(ConfigurationError, match=r"absent.*QLM_RECORD"):
        open_recorder(settings)


def test_a_service_started_again_carries_its_log_on(tmp_path: Path) -> None:
    settings = load_settings(record=tmp_path / "log.jsonl.gz")
    for number in (1, 2):
        recorder = open_recorder(settings)
        assert recorder is not None
        recorder.saw(snapshot(runs=[run_view(number, 1)]))
        recorder.close()
    entries = list(read_log(tmp_path / "log.jsonl.gz"))
    assert [e.run.run_id for e in entries if isinstance(e, ArrivalEntry)] == [1, 2]


@pytest.mark.parametrize("name", ["log.jsonl", "log.jsonl.gz"])
def test_a_log_is_carried_on_after_its_writer_was_killed(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with Recorder(path) as first:
        for number in (1, 2):
            first.saw(snapshot(runs=[run_view(number, 1)]))
            first.flush()
    path.write_bytes(path.read_bytes()[:-20])
    with Recorder(path, append=True) as second:
        second.saw(snapshot(runs=[run_view(3, 1)]))
    entries = list(read_log(path))
    assert [e.run.run_id for e in entries if isinstance(e, ArrivalEntry)] == [1, 3]
    assert [left.name for left in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["log.jsonl", "log.jsonl.gz"])
def test_a_log_that_is_written_is_not_taken_for_one_of_the_dead(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with Recorder(path) as writing:
        writing.saw(snapshot(runs=[run_view(1, 1)]))
        writing.flush()
        with pytest.raises(ConfigurationError, match=rf"{name}.*another scheduler writes it"):
            open_recorder(load_settings(record=path))
        writing.saw(snapshot(runs=[run_view(2, 1)]))
    entries = list(read_log(path))
    assert [e.run.run_id for e in entries if isinstance(e, ArrivalEntry)] == [1, 2]


def test_a_log_whose_compression_is_damaged_is_named_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl.gz"
    for number in (1, 2):
        with path.open("ab") as file:
            file.write(gzip.compress(b"{}\n")[: -12 * (2 - number) or None])
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match=r"log\.jsonl\.gz.*damaged"):
        open_recorder(load_settings(record=path))
    with pytest.raises(ValueError, match="damaged"):
        list(read_log(path))
    assert path.read_bytes() == before


def test_a_compressed_log_is_readable_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl.gz"
    with Recorder(path) as recorder:
        recorder.saw(snapshot(runs=[run_view(1, 1)]))
        recorder.flush()
        assert len(list(read_log(path))) == 1


def test_a_full_disk_ends_the_log_and_nothing_else() -> None:
    recorder = Recorder(Path("/dev/full"))
    for number in range(400):
        recorder.saw(snapshot(runs=[run_view(number, 1)]))
    recorder.flush()
    recorder.saw(snapshot(runs=[run_view(1000, 1)]))
    recorder.close()


def test_sets_are_written_in_order_so_that_equal_runs_give_equal_bytes(tmp_path: Path) -> None:
    names = [f"batch_{number}" for number in range(40)]
    pending = frozenset(names)
    seen = replace(snapshot(), unpromised=pending, finishing=pending)
    path = tmp_path / "log.jsonl"
    with Recorder(path) as recorder:
        plan = Plan(seen.now, "qlm", ())
        recorder.planned(PlanEntry("qlm", seen, (), EstimatorConfig(), 1, 0, plan))
    told = json.loads(path.read_bytes())["snapshot"]
    assert told["unpromised"] == told["finishing"] == sorted(names)
    (entry,) = read_log(path)
    assert isinstance(entry, PlanEntry)
    assert entry.snapshot == seen
