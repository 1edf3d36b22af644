"""`qlm simulate` as it is typed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from matplotlib.figure import Figure

from qlm_batch.control.recording import ArrivalEntry, Recorder, read_log
from qlm_batch.domain.errors import ConfigurationError, InvalidInput
from qlm_batch.domain.snapshot import Snapshot
from qlm_batch.simulation import plots
from qlm_cli.main import cli

SMALL = ["simulate", "-w", "W1", "--policy", "edf-shed", "--duration", "10s", "--load", "0.3"]


@pytest.mark.slow
def test_without_options_it_shows_what_the_scheduler_is_for() -> None:
    done = CliRunner().invoke(cli, ["simulate", "--json"], catch_exceptions=False)
    goodput = {row["policy"]: row["goodput"] for row in json.loads(done.stdout)["rows"]}
    assert goodput["qlm"] > 0.98
    assert goodput["qlm"] > goodput["edf"] + 0.05
    assert goodput["edf"] > goodput["fcfs"] + 0.05


def test_equal_seeds_print_equal_bytes() -> None:
    one, again, other = (
        CliRunner().invoke(cli, [*SMALL, "--json", "--seed", seed]).stdout for seed in "778"
    )
    assert one == again != other
    (row,) = json.loads(one)["rows"]
    assert row["policy"] == "edf-shed"
    assert 0.9 < row["goodput"] <= row["bound"] <= 1.0


def test_several_seeds_come_with_an_interval() -> None:
    done = CliRunner().invoke(cli, [*SMALL, "--json", "--seeds", "2"], catch_exceptions=False)
    told = json.loads(done.stdout)
    assert len(told["runs"]) == 2
    assert told["rows"][0]["goodput_ci"] >= 0.0


def test_a_trace_on_a_fleet_of_ones_own_is_drawn(tmp_path: Path) -> None:
    trace, fleet, plots = tmp_path / "t.csv", tmp_path / "f.yaml", tmp_path / "plots"
    trace.write_text(
        "timestamp,input_length,output_length\n"
        + "".join(f"{n * 100},80,{n % 30 + 1}\n" for n in range(120))
    )
    fleet.write_text("instances: [{name: x, device: a10, models: [mistral-7b], count: 2}]\n")
    done = CliRunner().invoke(
        cli,
        [*SMALL, "--trace", str(trace), "--fleet", str(fleet), "--plots", str(plots)],
        catch_exceptions=False,
    )
    assert done.exit_code == 0
    assert "mistral-7b on a10" in done.output
    made = sorted(path.name for path in plots.iterdir())
    assert made == ["attainment.png", "gantt-edf-shed.png", "latency.png"]


def test_bounds_are_seen_where_there_is_one_load(tmp_path: Path) -> None:
    figures: list[Figure] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots.plt, "close", figures.append)
        arguments = [*SMALL, "--duration", "5s", "--plots", str(tmp_path)]
        CliRunner().invoke(cli, arguments, catch_exceptions=False)
    (axes,) = figures[0].axes
    bounds = [line for line in axes.lines if "bound" in str(line.get_label())]
    assert len(bounds) == 2
    assert all(line.get_marker() not in ("None", "") for line in bounds)


def test_wrong_arguments_are_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match="W9"):
        CliRunner().invoke(cli, ["simulate", "-w", "W9"], catch_exceptions=False)
    with pytest.raises(ConfigurationError, match="nonsense"):
        CliRunner().invoke(cli, ["simulate", "--policy", "nonsense"], catch_exceptions=False)
    assert "--load" in CliRunner().invoke(cli, ["simulate", "--load", "-1"]).output


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--load", "nan"),
        ("--load", "inf"),
        ("--seed", "-1"),
        ("--duration", "0s"),
        ("--duration", "soon"),
        ("--windows", "1m,0s"),
    ],
)
def test_a_value_that_cannot_be_is_a_wrong_usage_of_its_option(option: str, value: str) -> None:
    done = CliRunner().invoke(cli, ["simulate", option, value])
    assert done.exit_code == 2
    assert option in done.output


def test_the_policies_to_choose_from_are_told_with_the_oracle() -> None:
    with pytest.raises(ConfigurationError, match="qlm-paper, qlm and oracle"):
        CliRunner().invoke(cli, ["simulate", "--policy", "qlm,,edf"], catch_exceptions=False)


def test_a_recorded_run_is_replayed_and_then_run_on_another_fleet(tmp_path: Path) -> None:
    log, fleet = tmp_path / "log.jsonl.gz", tmp_path / "f.yaml"
    fleet.write_text("instances: [{name: x, device: h100, models: [mistral-7b]}]\n")
    CliRunner().invoke(cli, [*SMALL, "--record", str(log)], catch_exceptions=False)
    done = CliRunner().invoke(
        cli, [*SMALL, "--replay", str(log), "--fleet", str(fleet), "--json"], catch_exceptions=False
    )
    told = json.loads(done.stdout)
    assert told["replay"]["plans"] == told["replay"]["same"] > 0
    assert told["rows"][0]["goodput"] > 0.9
    assert "as recorded, edf-shed" in done.stderr
    with pytest.raises(ConfigurationError, match="--fleet"):
        arguments = ["simulate", "-w", "W2", "--replay", str(log)]
        CliRunner().invoke(cli, arguments, catch_exceptions=False)


def test_a_history_runs_without_the_work_that_its_fleet_served_nowhere(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    CliRunner().invoke(cli, [*SMALL, "--record", str(log)], catch_exceptions=False)
    arguments = ["simulate", "--replay", str(log), "--policy", "edf-shed", "--json"]
    whole = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    seen = next(entry.run for entry in read_log(log) if isinstance(entry, ArrivalEntry))
    with Recorder(log, append=True) as recorder:
        ghost = replace(seen, run_id=-1, model="ghost", slices=1, requests=10)
        recorder.saw(Snapshot(0.0, (ghost,), ()))
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert "left out: 10 requests for ghost" in done.stderr
    assert json.loads(done.stdout)["rows"] == json.loads(whole.stdout)["rows"]


def test_a_history_runs_on_the_fleet_it_was_recorded_on_and_on_one_with_more(
    tmp_path: Path,
) -> None:
    log, fleet = tmp_path / "log.jsonl", tmp_path / "f.yaml"
    fleet.write_text(
        "instances: [{name: x, device: card, models: [mine]}]\n"
        "profiles: [{model: mine, device: card, base_ms: 30, per_sequence_ms: 0.1,"
        " kv_tokens: 60000, slots: 16, weights_gb: 14}]\n"
    )
    busy_minute = ["simulate", "-w", "W1", "--policy", "edf", "--load", "0.9", "--duration", "1m"]
    CliRunner().invoke(
        cli, [*busy_minute, "--fleet", str(fleet), "--record", str(log)], catch_exceptions=False
    )

    def busy(*more: str) -> float:
        done = CliRunner().invoke(
            cli, ["simulate", "--replay", str(log), "--policy", "edf", "--json", *more]
        )
        assert done.exit_code == 0, done.output
        (row,) = json.loads(done.stdout)["rows"]
        return float(row["busy"])

    alone = busy("--fleet", str(fleet))
    assert busy() == pytest.approx(alone, rel=0.1), "learned steps are not what was simulated"
    # Calls keep an engine stepping whenever one is inside, however few they are.
    with_one, with_two = busy("--add", "1"), busy("--add", "2:h100")
    assert with_one < 0.9 * alone
    assert with_two < 0.9 * with_one


def test_of_several_runs_the_first_is_recorded(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    done = CliRunner().invoke(
        cli, [*SMALL, "--policy", "edf,fcfs", "--seeds", "2", "--record", str(log), "--json"]
    )
    first, *_ = json.loads(done.stdout)["runs"]
    done = CliRunner().invoke(cli, ["simulate", "--replay", str(log), "--policy", "edf", "--json"])
    (again,) = json.loads(done.stdout)["runs"]
    assert again["requests"] == first["requests"]


def test_a_fleet_without_room_for_a_recorded_request_is_refused(tmp_path: Path) -> None:
    log, fleet = tmp_path / "log.jsonl", tmp_path / "f.yaml"
    CliRunner().invoke(cli, [*SMALL, "--record", str(log)], catch_exceptions=False)
    fleet.write_text("instances: [{name: x, device: h100, models: [mistral-7b], kv_tokens: 512}]\n")
    with pytest.raises(ConfigurationError, match="x-0 has no room"):
        arguments = ["simulate", "--replay", str(log), "--fleet", str(fleet)]
        CliRunner().invoke(cli, arguments, catch_exceptions=False)


def test_a_workload_in_which_nothing_arrives_is_told() -> None:
    with pytest.raises(InvalidInput, match="Nothing arrives"):
        CliRunner().invoke(cli, [*SMALL, "--load", "1e-9"], catch_exceptions=False)


def test_a_trace_as_recorded_runs_once_whatever_the_loads(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("timestamp,input_length,output_length\n0,80,9\n100,80,9\n")
    done = CliRunner().invoke(
        cli, [*SMALL, "--trace", str(trace), "--as-recorded", "--load", "0.3,0.9", "--json"]
    )
    assert len(json.loads(done.stdout)["runs"]) == 1


@pytest.mark.parametrize("more", ["x", "0", "-1", "1.5:h100"])
def test_what_cannot_be_added_is_a_wrong_usage(more: str) -> None:
    done = CliRunner().invoke(cli, ["simulate", "--add", more])
    assert done.exit_code == 2
    assert "2:h100" in done.output


def test_a_device_nobody_knows_cannot_be_added() -> None:
    with pytest.raises(ConfigurationError, match="moon"):
        CliRunner().invoke(cli, [*SMALL, "--add", "1:moon"], catch_exceptions=False)
