"""Workloads, traces and fleets as they are described."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qlm_batch.domain.errors import ConfigurationError, InvalidInput
from qlm_batch.simulation.cluster import START
from qlm_batch.simulation.devices import PROFILES
from qlm_batch.simulation.fleet import read_fleet
from qlm_batch.simulation.traces import Split, read_trace, workload_of
from qlm_batch.simulation.workload import requests_of
from qlm_batch.simulation.workloads import SCENARIOS, build, scenario
from tests.simulation.cases import fleet

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:48.1000000,10,0
"""


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_workload_is_the_same_for_the_same_seed(name: str) -> None:
    chosen = scenario(name)
    on = chosen.fleet()
    one, again, other = (build(chosen, on, 0.5, 120.0, seed) for seed in (1, 1, 2))
    a, b, c = (requests_of(work, START) for work in (one, again, other))
    assert np.array_equal(a.arrival, b.arrival) and np.array_equal(a.output, b.output)
    assert not np.array_equal(a.arrival, c.arrival)
    assert len(a) > 100
    assert (np.diff([arrival.at for arrival in one.arrivals]) >= 0).all()
    assert set(a.models) <= set(on.models)


def test_twice_the_load_is_twice_the_requests() -> None:
    chosen = scenario("W1")
    half, whole = (
        len(requests_of(build(chosen, chosen.fleet(), load, 1200.0, 0), START))
        for load in (0.5, 1.0)
    )
    assert whole == pytest.approx(2 * half, rel=0.15)


def test_lengths_drift_in_w5() -> None:
    chosen = scenario("W5")
    requests = requests_of(build(chosen, chosen.fleet(), 0.5, 600.0, 0), START)
    elapsed = (requests.arrival - START) / 600.0
    long = np.median(requests.output[(elapsed > 0.15) & (elapsed < 0.35)])
    short = np.median(requests.output[(elapsed > 0.65) & (elapsed < 0.85)])
    assert long > 2.5 * short


def test_an_unknown_workload_names_those_there_are() -> None:
    with pytest.raises(ConfigurationError, match="W1, W2"):
        scenario("W9")


def test_azures_columns_are_read_in_order_of_time(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(AZURE)
    trace = read_trace(path)
    assert trace.at == pytest.approx([0.0, 1.41941, 4.314579])
    assert trace.prompts.tolist() == [374, 10, 396]
    assert trace.outputs.tolist() == [44, 1, 109]


def test_mooncakes_lines_are_read_in_milliseconds(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"timestamp": 1000, "input_length": 6755, "output_length": 500, "hash_ids": [1]}\n'
        '{"timestamp": 4000, "input_length": 7322, "output_length": 490, "hash_ids": []}\n'
    )
    trace = read_trace(path)
    assert trace.at.tolist() == [0.0, 3.0]
    assert trace.prompts.tolist() == [6755, 7322]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,x,1\n"),
        ("b.csv", "time,in,out\n1,2,3\n"),
        ("c.jsonl", "\nnot json\n"),
        ("d.jsonl", "\n" + 100_000 * "[" + "\n"),
        ("e.csv", "time,in,out\n\n1,2,3\n"),
    ],
)
def test_a_trace_that_cannot_be_read_names_its_line(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InvalidInput, match=f"line {3 if name == 'e.csv' else 2}"):
        read_trace(path)


def test_a_quote_that_is_never_closed_is_told_as_a_trace_that_cannot_be_read(
    tmp_path: Path,
) -> None:
    path = tmp_path / "trace.csv"
    path.write_text('timestamp,input_length,output_length\n"0,1,1\n' + 30_000 * "1,1,1\n")
    with pytest.raises(InvalidInput, match="cannot be read"):
        read_trace(path)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("0,10,-4", "output_length is '-4', no count of tokens"),
        ("0,1e9,4", "input_length is '1e9', no count of tokens"),
        ("0,10,99999999999999999999", "no count of tokens"),
        ("nan,10,4", "timestamp is 'nan', no time"),
        ("soon,10,4", "timestamp is 'soon', no time"),
        ("0,10", "none empty"),
    ],
)
def test_a_value_a_trace_cannot_have_is_refused_by_its_column(
    tmp_path: Path, row: str, said: str
) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(f"timestamp,input_length,output_length\n0,10,4\n{row}\n")
    with pytest.raises(InvalidInput, match=f"line 3: .*{said}"):
        read_trace(path)


def test_time_stamps_may_name_their_zone(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.68059Z,1,1\n"
        "2023-11-16T19:15:47.68059+01:00,1,1\n"
        "2023-11-16 18:15:48,1,1\n"
    )
    assert read_trace(path).at == pytest.approx([0.0, 1.0, 1.31941])


def test_an_empty_trace_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.csv"
    path.write_text("timestamp,input_length,output_length\n")
    with pytest.raises(InvalidInput, match="no requests"):
        read_trace(path)


def test_a_trace_is_split_into_classes_and_batches_without_losing_requests(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    rows = "".join(f"{n * 1000},100,{n % 50 + 1}\n" for n in range(500))
    path.write_text("timestamp,input_length,output_length\n" + rows)
    split = Split(interactive=0.4, windows_s=(60.0, 600.0, 3600.0), lines=16)
    work = workload_of("t", read_trace(path), fleet(1), split, 0)
    requests = requests_of(work, START)
    assert len(requests) == 500
    assert sorted(requests.output.tolist()) == sorted(n % 50 + 1 for n in range(500))
    assert requests.interactive.mean() == pytest.approx(0.4, abs=0.08)
    assert len(work.classes) == 4
    assert max(len(arrival.prompts) for arrival in work.arrivals) == 16


def test_a_load_stretches_a_traces_time(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "timestamp,input_length,output_length\n" + "".join(f"{n},100,50\n" for n in range(500))
    )
    spans = [
        workload_of("t", read_trace(path), fleet(1), Split(), 0, load=load).duration
        for load in (0.5, 1.0)
    ]
    assert spans[0] == pytest.approx(2 * spans[1])


def test_a_fleet_file_describes_instances_and_devices_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(
        """
instances:
  - {name: big, count: 2, device: a100, models: [mistral-7b, llama-2-7b], slots: 64}
  - {name: own, device: toaster, models: [tiny]}
profiles:
  - {model: tiny, device: toaster, base_ms: 5, kv_tokens: 1000, slots: 4, weights_gb: 0.1}
"""
    )
    on = read_fleet(path)
    assert [spec.name for spec in on.instances] == ["big-0", "big-1", "own-0"]
    assert on.models == ("llama-2-7b", "mistral-7b", "tiny")
    assert on.instances[0].slots == 64
    assert on.instances[2].profile("tiny").step.base == 0.005


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("instances: [{name: a, device: a100}]", "models"),
        ("instances: [{name: a, device: a100, models: [m], slot: 3}]", "slot"),
        ("instances: [{name: a, device: moon, models: [mistral-7b]}]", "mistral-7b on a100"),
        (
            "instances: [{name: a, device: a100, models: [mistral-7b]},"
            " {name: a, device: h100, models: [mistral-7b]}]",
            "share a name",
        ),
        ("[1, 2", r"cannot be read.*in \".*fleet.yaml\", line 1"),
        ("\udcff", "cannot be read"),
        ("", "mapping of fields"),
        ("instances: []", "instances: must not be empty"),
        ("instances: [{name: x, device: a10, models: m}]", "models: must be a list"),
        ("instances: [{name: a, device: a100, models: [m, m]}]", "named twice"),
    ],
)
def test_a_wrong_fleet_file_is_refused_with_the_field(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ConfigurationError, match=f"(?s){told}"):
        read_fleet(path)


def test_extrapolated_devices_are_marked() -> None:
    assert {device for (_, device), p in PROFILES.items() if p.extrapolated} == {"a10"}
    assert PROFILES["opt-13b", "a100"].kv_tokens == 66_144
