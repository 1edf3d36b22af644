"""Our policy with true lengths: what better estimates could bring at most. For the simulator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qlm_batch.domain.snapshot import Plan, RequestGroup, Snapshot
from qlm_batch.scheduling.estimator import EstimatorConfig, Ready
from qlm_batch.scheduling.fairness import Served
from qlm_batch.scheduling.policies.qlm import QLM
from qlm_batch.scheduling.problem import Durations
from qlm_batch.scheduling.worktable import WorkTable

TrueLength = Callable[[RequestGroup], float]
"""The output tokens a group's requests will have in all."""


class TrueDurations:
    """An estimator's durations with the true lengths of groups in place of expected ones."""

    def __init__(self, estimated: Durations, length: TrueLength) -> None:
        self._estimated, self._length = estimated, length

    @property
    def config(self) -> EstimatorConfig:
        """As estimated: lengths are not all that a plan may be wrong about."""
        return self._estimated.config

    @property
    def served(self) -> Served:
        """As estimated."""
        return self._estimated.served

    def serves(self, instance: int, model: str) -> bool:
        """As estimated."""
        return self._estimated.serves(instance, model)

    def expected_tokens(self, group: RequestGroup) -> float:
        """The true number."""
        return self._length(group)

    def table(self, groups: Sequence[RequestGroup]) -> WorkTable:
        """Work in proportion to true lengths, without spread."""
        table = self._estimated.table(groups)
        ratio = np.array(
            [self._length(group) / max(1.0, self._estimated.expected_tokens(group))
             for group in groups]
        )  # fmt: skip
        return replace(table, count=table.count * ratio, var=np.zeros_like(table.var))

    def ready(self, instance: int) -> Ready:
        """As estimated."""
        return self._estimated.ready(instance)

    def swap_s(self, instance: int, model: str) -> float:
        """As estimated."""
        return self._estimated.swap_s(instance, model)

    def drain_s(self, instance: int, model: str) -> float:
        """As estimated."""
        return self._estimated.drain_s(instance, model)


@dataclass(frozen=True, slots=True)
class OraclePolicy:
    """See the module; `length` tells the truth about a group."""

    length: TrueLength
    name: str = "oracle"

    def plan(
        self,
        snapshot: Snapshot,
        groups: Sequence[RequestGroup],
        estimator: Durations,
        moves: int,
        seed: int,
    ) -> Plan:
        """See Policy."""
        known = TrueDurations(estimator, self.length)
        return replace(QLM.plan(snapshot, groups, known, moves, seed), policy=self.name)
