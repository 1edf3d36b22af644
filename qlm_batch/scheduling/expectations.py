"""The output lengths one snapshot lets expect: of new work, of given prompts, of what runs."""

from __future__ import annotations

from qlm_batch.domain.buckets import PromptMix
from qlm_batch.domain.jobs import EngineKind
from qlm_batch.scheduling.flows import Shape, from_grid
from qlm_batch.scheduling.lengthbook import Answers
from qlm_batch.scheduling.lengths import Ages, LengthDistribution
from qlm_batch.scheduling.profile import Knowledge
from qlm_batch.scheduling.running import Running
from qlm_batch.scheduling.worktable import Floats

_MOST_FACTORS = 1 << 14
"""Answers kept about mixes of prompts: every look at the queue makes new ones."""


class ExpectedLengths:
    """What the books and the running requests say together; every answer is worked out once."""

    def __init__(self, knowledge: Knowledge, running: Running) -> None:
        self._knowledge, self._running = knowledge, running
        self._ages: dict[str, Ages] = {}
        self._lengths: dict[tuple[str, EngineKind, str], LengthDistribution] = {}
        self._capped: dict[tuple[str, EngineKind, str, int], LengthDistribution] = {}
        self._left: dict[tuple[str, int], tuple[Floats, Floats]] = {}
        self._answers: dict[tuple[str, str], Answers] = {}
        self._factors: dict[tuple[str, str, int], tuple[PromptMix, float]] = {}

    def of(self, model: str, kind: EngineKind, tenant: str) -> LengthDistribution:
        """Of a tenant's work; of anybody's where `tenant` is empty."""
        key = (model, kind, tenant)
        if key not in self._lengths:
            book = self._knowledge.book(model)
            if model not in self._ages:
                self._ages[model] = self._running.ages(model)
            of_model = self.of(model, kind, "") if tenant else None
            self._lengths[key] = book.distribution(kind, tenant, self._ages[model], of_model)
        return self._lengths[key]

    def capped(self, model: str, kind: EngineKind, tenant: str, cap: int) -> LengthDistribution:
        """The same under an output limit, given as a point of the grid."""
        key = (model, kind, tenant, cap)
        found = self._capped.get(key)
        if found is None:
            found = self.of(model, kind, tenant).capped(max(1.0, from_grid(cap)))
            self._capped[key] = found
        return found

    def factor(self, shape: Shape, prompts: PromptMix) -> float:
        """How many usual requests of its shape one with these prompts is."""
        if not prompts:
            return 1.0
        model, kind, tenant, _, cap = shape
        usual = max(1.0, self.capped(model, kind, tenant, cap).mean)
        return min(max(1.0, from_grid(cap) / usual), self.of_prompts(model, tenant, prompts))

    def of_prompts(self, model: str, tenant: str, prompts: PromptMix) -> float:
        """The same where no limit on output tokens bounds it."""
        # By identity, which is told faster than equality; kept here, an object keeps its own.
        key = (model, tenant, id(prompts))
        found = self._factors.get(key)
        if found is None:
            if len(self._factors) >= _MOST_FACTORS:
                self._factors.clear()
            answers = self._answers.get((model, tenant))
            if answers is None:
                answers = self._knowledge.book(model).answers(tenant)
                self._answers[model, tenant] = answers
            found = self._factors[key] = (prompts, answers.factor(prompts))
        return found[1]

    def still(self, model: str, shape: Shape) -> tuple[Floats, Floats]:
        """By instance, the tokens its running requests of the model still have before them.

        Means and variances; `shape` says how long they may become.
        """
        key = (model, shape[4])
        found = self._left.get(key)
        if found is None:
            lengths = self.capped(model, shape[1], "", shape[4])
            found = self._left[key] = self._running.left(model, lengths)
        return found
