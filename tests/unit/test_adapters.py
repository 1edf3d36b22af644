"""LoRA adapters: what the settings may say, and how a worker and the planner see them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qlm_batch.domain.errors import ConfigurationError
from qlm_batch.domain.jobs import EngineKind
from qlm_batch.domain.snapshot import InstanceView, Residency
from qlm_batch.scheduling.estimator import Estimator
from qlm_batch.scheduling.problem import START, Problem
from qlm_batch.settings import Settings
from qlm_workers.adapters import adapters_of
from qlm_workers.hosts import Host
from qlm_workers.meter import Meter
from tests.unit.planning_cases import assigned, group, instance, snapshot
from tests.unit.runner_rig import until, working
from tests.unit.test_dispatching import handed, of_run
from tests.unit.worker_fakes import FakeEngine, FakeStore, make_slice


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of rank 8."""
    (tmp_path / "adapter_config.json").write_text('{"r": 8}')
    return tmp_path


def test_an_adapter_belongs_to_the_first_generating_model_or_to_the_one_named(folder: Path) -> None:
    models = ("embed:e", "a", "b")
    found = adapters_of(Settings(models=models, lora=(f"x={folder}", f"b:y={folder}")))
    assert [(own.name, own.base, own.rank) for own in found] == [("x", "a", 8), ("y", "b", 8)]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("x", "neither NAME=FOLDER"),
        ("=folder", "neither NAME=FOLDER"),
        ("c:x={folder}", "served here: a, b"),
        ("a={folder}", "'a' is used twice"),
        ("x={folder}/absent", "adapter_config.json"),
    ],
)
def test_an_adapter_that_cannot_be_served_is_refused(folder: Path, entry: str, said: str) -> None:
    settings = Settings(models=("a", "b"), lora=(entry.format(folder=folder),))
    with pytest.raises(ConfigurationError, match=said):
        adapters_of(settings)


def test_a_server_loads_its_adapters_itself(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match="loads its adapters itself"):
        adapters_of(Settings(models=("a",), lora=(f"x={folder}",), engine="openai"))


def test_a_model_and_its_adapters_share_residency() -> None:
    meters = [Meter("i", "cpu", name) for name in ("m", "x")]
    host = Host("m", EngineKind.GENERATE, FakeEngine(), *meters)  # type: ignore[arg-type]
    assert [(v.name, v.parent, v.residency) for v in host.views()] == [
        ("m", "", Residency.COLD),
        ("x", "m", Residency.COLD),
    ]


async def test_work_for_an_adapter_goes_to_its_base_and_is_told_under_its_own_name() -> None:
    store = FakeStore(make_slice(1, 4, model="x"), make_slice(2, 4))
    async with working(store, FakeEngine(), adapters=("x",)):
        await until(lambda: store.completed == {1, 2})
        await until(lambda: {o.model for b in store.beats for o in b.observations} == {"m", "x"})
    seen = [o for b in store.beats for o in b.observations]
    outputs = {name: sum(len(o.outputs) for o in seen if o.model == name) for name in ("m", "x")}
    assert outputs == {"m": 4, "x": 4}
    assert sum(o.requests for o in seen if o.model == "m") == 8


def with_adapter(**fields: object) -> InstanceView:
    """An instance whose model `m` sleeps, with an adapter `x`, while `o` is awake."""
    where = {"m": Residency.ASLEEP, "x": Residency.ASLEEP, "o": Residency.AWAKE}
    view = instance("i", where, wake_s=9.0, **fields)  # type: ignore[arg-type]
    models = tuple(replace(own, parent="m" if own.name == "x" else "") for own in view.models)
    return replace(view, models=models)


def test_between_a_model_and_its_adapters_nothing_is_lost() -> None:
    groups = [group("1", deadline=99.0, model="m"), group("2", deadline=99.0, model="x")]
    seen = snapshot(instances=[with_adapter()])
    problem = Problem(seen, groups, Estimator(seen))
    m, x = problem.models.index("m"), problem.models.index("x")
    assert problem.setup[0, START, x] == 9.0
    assert problem.setup[0, m, x] == problem.setup[0, x, m] == 0.0


def test_an_adapter_is_as_fast_as_its_base() -> None:
    seen = snapshot(instances=[with_adapter()])
    estimator = Estimator(seen)
    flows = [estimator.flow(0, name, EngineKind.GENERATE, "", 100, 100) for name in ("m", "x")]
    assert flows[0].step_s == flows[1].step_s


def test_a_model_and_its_adapters_share_what_an_instance_is_handed() -> None:
    view = with_adapter(slots=256)
    awake = {"m": Residency.AWAKE, "x": Residency.AWAKE, "o": Residency.ASLEEP}
    view = replace(view, models=tuple(replace(m, residency=awake[m.name]) for m in view.models))
    busy = replace(view, assigned=(assigned(9, 400, model="m"),))
    assert [a.slices for a in handed(view, [of_run(1, 100, model="x")])] == [7]
    assert [a.slices for a in handed(busy, [of_run(1, 100, model="x")])] == [1]
