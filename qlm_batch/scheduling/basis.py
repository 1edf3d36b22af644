"""What estimates rest on besides the queue, with what was worked out from it so far.

What is known of lengths and speeds changes when instances report, every two seconds or so; a pass
over the queue is made several times as often, and goes on with the answers of the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from qlm_batch.domain.snapshot import InstanceState, InstanceView, ModelView
from qlm_batch.scheduling.expectations import ExpectedLengths
from qlm_batch.scheduling.fleet import Fleet
from qlm_batch.scheduling.flows import Flow, Shape
from qlm_batch.scheduling.profile import Knowledge
from qlm_batch.scheduling.running import Running
from qlm_batch.scheduling.speed import Speed, StepTime

_Report = tuple[InstanceState, tuple[ModelView, ...], tuple[int, ...], float, int, int, str]


@dataclass(slots=True, eq=False)
class Basis:
    """Knowledge and reports, and answers by shape of work, model and class of instances."""

    knowledge: Knowledge
    reports: tuple[_Report, ...]
    fleet: Fleet
    running: Running
    expected: ExpectedLengths
    flows: dict[tuple[Shape, int], Flow] = field(default_factory=dict)
    speeds: dict[tuple[str, str], tuple[Speed, StepTime]] = field(default_factory=dict)
    drains: dict[tuple[str, int], float] = field(default_factory=dict)

    @staticmethod
    def of(instances: Sequence[InstanceView], knowledge: Knowledge, before: Basis | None) -> Basis:
        """The basis of these reports: `before` itself where nothing it rests on has changed."""
        reports = tuple(_report(view) for view in instances)
        same = before is not None and not knowledge.is_news(before.knowledge)
        if before is not None and same and before.reports == reports:
            return before
        running = Running(instances)
        return Basis(
            knowledge, reports, Fleet(instances), running, ExpectedLengths(knowledge, running)
        )


def _report(view: InstanceView) -> _Report:
    """What an instance says of itself that estimates depend on, but for what it holds."""
    return (
        view.state,
        view.models,
        view.generated,
        view.interactive_share,
        view.slots,
        view.kv_tokens,
        view.device,
    )
