"""The paper's mixed-integer program beside every order there is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations, product

from hypothesis import given, settings
from hypothesis import strategies as st

from qlm_batch.domain.snapshot import ModelView
from qlm_batch.scheduling.policies.paper import solved
from qlm_batch.scheduling.problem import START, Problem, Queues
from tests.unit.planning_cases import KnownDurations, group, instance, snapshot

MODELS = "mno"
GAP = 0.05
"""The share of its answer by which the best may be less."""


class Draining(KnownDurations):
    """Durations in which leaving a model costs what its name says."""

    def drain_s(self, instance: int, model: str) -> float:
        return 15.0 * MODELS.index(model)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    count = draw(st.integers(1, 4))
    seconds = st.integers(1, 40).map(float)
    hosts = [
        sorted(draw(st.sets(st.sampled_from(MODELS), min_size=1)))
        for _ in range(draw(st.integers(1, 2)))
    ]
    groups = [
        group(
            f"g{n}",
            model=draw(st.sampled_from(MODELS)),
            # Never just in time, which the solver's tolerance would decide.
            deadline=draw(st.integers(5, 160)) + 0.5,
        )
        for n in range(count)
    ]
    durations = Draining(
        {g.key: [draw(seconds) for _ in hosts] for g in groups},
        [frozenset(own) for own in hosts],
        awake=[frozenset(draw(st.sets(st.sampled_from(own), max_size=2))) for own in hosts],
        swap=draw(seconds),
        ready=[draw(seconds) for _ in hosts],
    )
    fleet = [instance(f"i{n}", own) for n, own in enumerate(hosts)]
    if draw(st.booleans()):
        fleet = [replace(view, models=tuple(map(adapter, view.models))) for view in fleet]
    return Problem(snapshot(instances=fleet), groups, durations)


def adapter(model: ModelView) -> ModelView:
    """The model as one that shares its engine with others."""
    return model if model.name == MODELS[0] else replace(model, parent=MODELS[1])


def waits(problem: Problem, queues: Queues) -> float | None:
    """The sum of waits; None where a deadline is missed."""
    total = 0.0
    for i, queue in enumerate(queues):
        clock, last = float(problem.ready[i]), START
        for g in queue:
            clock += float(problem.setup[i, last, problem.model[g]])
            total, last = total + clock, problem.model[g]
            clock += problem.mean(g, i)
            if clock + problem.tail(g, i) > problem.due[g]:
                return None
    return total


def every_order(problem: Problem) -> Iterator[Queues]:
    able = [g for g in range(len(problem.groups)) if problem.placeable(g)]
    for order in permutations(able):
        for owners in product(range(len(problem.instances)), repeat=len(able)):
            queues = problem.empty
            for g, i in zip(order, owners, strict=True):
                queues[i].append(g)
            if all(problem.serves[i, problem.model[g]] for g, i in zip(order, owners, strict=True)):
                yield queues


@given(problem=problems())
@settings(max_examples=100, deadline=None)
def test_the_papers_program_is_as_good_as_the_best_order(problem: Problem) -> None:
    every = [waits(problem, queues) for queues in every_order(problem)]
    best = min((wait for wait in every if wait is not None), default=None)
    queues = solved(problem)
    if best is None:
        assert queues is None
        return
    assert queues is not None
    reached = waits(problem, queues)
    assert reached is not None
    assert best - 1e-6 <= reached <= best / (1.0 - GAP) + 1e-3
