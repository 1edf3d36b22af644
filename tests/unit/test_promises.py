"""When batches end: worked out for all at once, as it would be for each part by itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple, replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qlm_batch.domain.buckets import prompt_mix
from qlm_batch.domain.snapshot import (
    AssignedView,
    InstanceState,
    Observation,
    Output,
    Plan,
    PlannedGroup,
    RequestGroup,
    Residency,
    RunView,
    Snapshot,
    VirtualQueue,
)
from qlm_batch.scheduling.calibration import Foreseen
from qlm_batch.scheduling.estimator import Estimator
from qlm_batch.scheduling.flows import few
from qlm_batch.scheduling.grouping import form_groups
from qlm_batch.scheduling.policies import policy
from qlm_batch.scheduling.profile import fold
from qlm_batch.scheduling.promises import ends_of, with_estimates
from tests.unit.planning_cases import assigned, instance, run_view, snapshot

MODELS = ("m", "n", "x")
HOSTED = (("m",), ("m", "n"), {"n": Residency.AWAKE, "m": Residency.COLD})
STEPS = tuple((n, 300 * n, 0, 0.01 + 0.001 * n) for n in range(1, 33)) * 10
SEEN = (
    Observation("i", "A100", "m", 0.0, (Output("t", 90, 9), Output("u", 700, 900)) * 50, STEPS),
    Observation("j", "A10", "m", 0.0, (Output("t", 90, 9),) * 50, (), 64_000, 640, 100.0),
    Observation("i", "A100", "n", 0.0, (Output("t", 200, 9),) * 9),
)
Part = tuple[str, str, str, Foreseen, float]
"""A batch, the model and the reason of a part of it, when that ends, and the time it has."""


@st.composite
def run_views(draw: st.DrawFn, number: int) -> RunView:
    slices = draw(st.integers(1, 4))
    made = run_view(
        number,
        slices,
        requests=slices * draw(st.integers(1, 64)),
        deadline=draw(st.sampled_from([-5.0, 30.0, 300.0, 3000.0])),
        model=draw(st.sampled_from(MODELS)),
        tenant=draw(st.sampled_from("tu")),
        batch_id=f"batch-{draw(st.integers(0, 5))}",
        max_tokens=draw(st.sampled_from([40, 400, 4000])),
    )
    asked = draw(st.sampled_from([(), prompt_mix([9]), prompt_mix([9, 900])]))
    return replace(made, prompts=asked)


@st.composite
def situations(draw: st.DrawFn) -> Snapshot:
    """Up to three instances with work in hand, and a queue for models of which one is nowhere."""
    fleet = []
    for n in range(draw(st.integers(1, 3))):
        held = tuple(
            assigned(
                100 * (n + 1) + k,
                draw(st.integers(0, 90)),
                deadline=draw(st.sampled_from([10.0, 1000.0])),
                model=draw(st.sampled_from(MODELS)),
            )
            for k in range(draw(st.integers(0, 2)))
        )
        made = instance(
            f"i{n}",
            draw(st.sampled_from(HOSTED)),
            state=draw(st.sampled_from([InstanceState.READY, InstanceState.STARTING])),
            slots=draw(st.sampled_from([8, 32])),
            device=draw(st.sampled_from(["A100", "A10"])),
            assigned=held,
            generated=tuple(draw(st.lists(st.integers(0, 90), max_size=4))),
        )
        fleet.append(replace(made, interactive_share=draw(st.sampled_from([0.0, 0.5]))))
    queue = [draw(run_views(n)) for n in range(1, 1 + draw(st.integers(0, 12)))]
    return replace(
        snapshot(runs=queue, instances=fleet, now=3.0),
        profiles=fold((), SEEN) if draw(st.booleans()) else (),
    )


class Alone:
    """Every part by itself: where it stands, how long its last requests take, what is told."""

    def __init__(self, plan: Plan, situation: Snapshot) -> None:
        self.plan, self.situation = plan, situation
        self.estimator = Estimator(situation)

    def parts(self) -> Iterator[Part]:
        """All parts of all batches, first the planned ones."""
        names = [view.name for view in self.situation.instances]
        for queue in self.plan.queues:
            i = names.index(queue.instance)
            if queue.groups:
                inside, awake = self.in_hand(i), self.estimator.ready(i).awake
            for placed in queue.groups:
                group = placed.group
                inside += group.requests if group.model in awake else math.inf
                end = placed.finish_mean - self.situation.now
                start = placed.start - self.situation.now
                whole, _, _ = self.last(i, group, group.requests, inside)
                occupied = max(0.0, end - whole - start)
                for batch_id, requests, behind in self.batches(group):
                    own = self.last(i, group, requests, inside)
                    mean = end - (whole - own[0]) - behind * occupied
                    told = self.told(mean, placed.finish_var, own, group.model, i)
                    yield (
                        batch_id,
                        group.model,
                        self.reason(queue, placed, batch_id),
                        told,
                        group.deadline,
                    )
        for i, view in enumerate(self.situation.instances):
            for own in view.assigned:
                if own.requests and self.estimator.serves(i, own.model):
                    mean, var = self.estimator.ready(i).ends[own.run_id, own.generation]
                    mean += self.estimator.tail_s(i, own)
                    last = self.last(i, own, own.requests, self.in_hand(i))
                    told = self.told(mean, var, last, own.model, i)
                    reason = f"running on {view.name}; model {own.model}"
                    yield own.batch_id, own.model, reason, told, own.deadline

    def reason(self, queue: VirtualQueue, placed: PlannedGroup, batch_id: str) -> str:
        """Why it is there, where only what stands before the batch's first group is ahead.

        A batch of several parts has the reason of its last one, and is told so.
        """
        alone = self.parts_of(batch_id) == 1
        if placed.shed:
            return ("" if alone else "its last part is ") + f"let go: {placed.reason}"
        ahead = next(n for n, own in enumerate(queue.groups) if batch_id in own.group.batches)
        where, on, rest = placed.reason.partition(" on ")
        assert where.startswith(("next", "starts after"))
        many = f"starts after {ahead} group{'s' * (ahead != 1)}"
        if not alone:
            rest = rest.replace("of it in time", "of its last part in time")
        return (many if ahead else "next") + on + rest

    def parts_of(self, batch_id: str) -> int:
        """In how many parts the batch stands in queues and in hand."""
        planned = [own.group for queue in self.plan.queues for own in queue.groups]
        held = [
            own
            for i, view in enumerate(self.situation.instances)
            for own in view.assigned
            if own.requests and self.estimator.serves(i, own.model)
        ]
        return sum(own == batch_id for group in planned for own, _, _ in self.batches(group)) + sum(
            own.batch_id == batch_id for own in held
        )

    def in_hand(self, i: int) -> float:
        view = self.situation.instances[i]
        held = [own for own in view.assigned if own.requests]
        asleep = any(own.model not in self.estimator.ready(i).awake for own in held)
        if asleep or view.state is not InstanceState.READY:
            return math.inf
        return sum(own.requests for own in held)

    def batches(self, group: RequestGroup) -> Iterator[tuple[str, int, float]]:
        batch_of = {run.run_id: run.batch_id for run in self.situation.runs}
        done = 0
        if len(group.batches) == 1:
            yield group.batches[0], group.requests, 0.0
            return
        for part in group.parts:
            done += part.slices
            requests = max(1, round(group.requests * part.slices / group.slices))
            yield batch_of[part.run_id], requests, 1.0 - done / group.slices

    def last(
        self, i: int, work: RequestGroup | AssignedView, requests: int, inside: float
    ) -> tuple[float, float, bool]:
        """How long the longest takes, as mean and variance, and whether all runs together."""
        view, count = self.situation.instances[i], work.requests
        kind = next(model.kind for model in view.models if model.name == work.model)
        prompt, limit = work.prompt_tokens / count, work.max_tokens / count
        flow = self.estimator.flow(i, work.model, kind, work.tenant, prompt, limit)
        speed = self.estimator.knowledge.speed(work.model, view.device)
        base_s = flow.step_s
        if not speed.rate_only:
            base_s = min(base_s, speed.step_time().base / speed.efficiency)
        together = inside <= flow.running
        full = inside / flow.running if together else 1.0
        seconds = base_s + (flow.step_s - base_s) * full
        asked = few(min(requests if together else few(requests), round(flow.running)))
        if isinstance(work, RequestGroup):
            expected = self.estimator.expected_tokens
            seconds *= expected(work) / expected(replace(work, prompts=()))
        seconds *= 1.0 if together else 1.0 / (1.0 - view.interactive_share)
        lengths = flow.lengths
        mean, var = lengths.largest_of(asked) * seconds, lengths.largest_var(asked) * seconds**2
        return mean, var, together

    def told(
        self, mean: float, var: float, last: tuple[float, float, bool], model: str, i: int
    ) -> Foreseen:
        """What is told of a part whose turn ends so, or sooner if all runs together."""
        # What ends as soon in both ways has two variances, and rounding decides.
        assume(not (last[2] and math.isclose(last[0], mean, rel_tol=1e-9)))
        if last[2] and last[0] < mean:
            mean, var = last[0], last[1]
        else:
            var += last[1]
        known, mean = self.estimator.knowledge, max(1e-6, mean)
        book, speed = known.book(model), known.speed(model, self.situation.instances[i].device)
        unknown = math.hypot(0.5 * book.unknown, 0.5 * speed.unknown)
        squared = var / mean**2 + 0.1**2 + book.mean_error**2 + unknown**2
        error = math.sqrt(math.log1p(squared))
        return known.quantiles(model).foreseen(mean, error, unknown <= 0.1)


@given(situation=situations(), name=st.sampled_from(["qlm", "edf"]))
@settings(max_examples=150, deadline=None)
def test_all_batches_at_once_end_as_each_of_their_parts_does(
    situation: Snapshot, name: str
) -> None:
    estimator = Estimator(situation)
    groups = form_groups(situation, estimator.capacities(situation))
    plan = policy(name).plan(situation, groups, estimator, 10, 0)
    parts: dict[str, list[Part]] = {}
    for part in Alone(plan, situation).parts():
        parts.setdefault(part[0], []).append(part)
    unserved = {batch_id for lost in plan.unplaced for batch_id in lost.group.batches}
    found = ends_of(plan, situation, estimator)
    assert found.keys() == parts.keys() - unserved
    for batch_id, end in found.items():
        own = parts[batch_id]
        latest = max(told.p50_s for _, _, _, told, _ in own)
        last = [part for part in own if math.isclose(part[3].p50_s, latest, rel_tol=1e-9)]
        assert (end.model, end.reason) in {(model, reason) for _, model, reason, _, _ in last}
        assert any(astuple(end.told) == pytest.approx(astuple(part[3])) for part in last)
        misses = [told.beyond(deadline - situation.now) for *_, told, deadline in own]
        assert end.miss == pytest.approx(max(misses), abs=1e-9)
    estimates = with_estimates(plan, found).estimates
    assert estimates.keys() == parts.keys() | unserved
    assert all(estimates[batch_id].p50 is None for batch_id in unserved)


def why(run: RunView) -> str:
    """The reason told of a batch that has an instance to itself."""
    situation = snapshot(runs=[run], instances=[instance("i")])
    estimator = Estimator(situation)
    groups = form_groups(situation, estimator.capacities(situation))
    plan = policy("qlm").plan(situation, groups, estimator, 10, 0)
    return ends_of(plan, situation, estimator)[run.batch_id].reason


def test_a_batch_let_go_in_part_is_not_told_to_be_let_go() -> None:
    assert why(run_view(1, 100, deadline=60.0)).startswith("its last part is let go: needs ")
    assert why(run_view(1, 1, deadline=-3.0)) == "let go: its deadline passed 3 s ago"


def test_the_share_in_time_of_a_batchs_last_part_is_not_told_as_its_own() -> None:
    assert why(run_view(1, 10, deadline=20.0)).endswith(" % of its last part in time")
