"""What would become of work that is not submitted yet: asked of a snapshot, changing nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from qlm_batch.domain.buckets import PromptMix
from qlm_batch.domain.durations import WINDOW_MAX_S
from qlm_batch.domain.jobs import EngineKind, Estimate, OnMiss, SloClass
from qlm_batch.domain.snapshot import Plan, RunView, Snapshot
from qlm_batch.scheduling.estimator import Estimator, EstimatorConfig
from qlm_batch.scheduling.fleet import SERVING
from qlm_batch.scheduling.grouping import form_groups
from qlm_batch.scheduling.policies import Policy
from qlm_batch.scheduling.promises import ends_of, with_estimates

MISS_ACCEPTED = 0.05
"""The greatest chance of a miss at which work is accepted without a warning."""
MISS_REFUSED = 0.5
WINDOW_MARGIN = 1.05
_TRIES = 4
_ASKED = "asked"
_UNBOUNDED = 4096
"""Tokens assumed for an unbounded request of a model that no instance hosts."""


class Verdict(StrEnum):
    """`accept`: it should hold. `warn`: it may not, or makes others late. `refuse`: it will not."""

    ACCEPT = "accept"
    WARN = "warn"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class Work:
    """Requests of one model: sums over all of them; `unbounded` of them set no token limit.

    `prompts` are empty where their lengths are not known one by one.
    """

    model: str
    requests: int
    prompt_tokens: int
    max_tokens: int
    unbounded: int = 0
    prompts: PromptMix = ()


@dataclass(frozen=True, slots=True)
class Admission:
    """The answer: `estimate` in absolute times, and the shortest window that would hold.

    `earliest_window_s` is None where none would that may be asked for. `others` are batches it
    would make late.
    """

    verdict: Verdict
    estimate: Estimate
    deadline: float
    earliest_window_s: float | None
    others: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Admissions:
    """Asks a policy about hypothetical work."""

    policy: Policy
    moves: int
    seed: int = 0
    config: EstimatorConfig | None = None
    slice_requests: int = 64

    def foresee(
        self,
        snapshot: Snapshot,
        work: Sequence[Work],
        tenant: str,
        window_s: float,
        on_miss: OnMiss = OnMiss.EXPIRE,
    ) -> Admission:
        """What would happen if a batch of this work were accepted now. Pure."""

        def within(seconds: float) -> tuple[Estimate, Plan]:
            runs = tuple(
                self._run(snapshot, n, own, tenant, seconds, on_miss)
                for n, own in enumerate(work, 1)
            )
            plan = self._plan(replace(snapshot, runs=(*snapshot.runs, *runs)))
            return plan.estimates[_ASKED], plan

        estimate, plan = within(window_s)
        deadline = snapshot.now + window_s
        if estimate.p95 is None or estimate.miss_probability is None:
            return Admission(Verdict.REFUSE, estimate, deadline, None, ())
        others = _newly_late(self._plan(snapshot), plan)
        verdict = Verdict.ACCEPT
        if estimate.miss_probability > MISS_REFUSED:
            verdict = Verdict.REFUSE
        elif estimate.miss_probability > MISS_ACCEPTED or others:
            verdict = Verdict.WARN
        earliest_s: float | None = None
        wanted_s = (estimate.p95 - snapshot.now) * WINDOW_MARGIN
        for _ in range(_TRIES):
            if wanted_s > WINDOW_MAX_S:
                break
            found, _ = within(wanted_s)
            if found.p95 is None or found.miss_probability is None:
                break
            if found.miss_probability <= MISS_ACCEPTED:
                earliest_s = wanted_s
                break
            wanted_s = max(1.25 * wanted_s, (found.p95 - snapshot.now) * WINDOW_MARGIN)
        return Admission(verdict, estimate, deadline, earliest_s, others)

    def _plan(self, snapshot: Snapshot) -> Plan:
        estimator = Estimator(snapshot, self.config)
        groups = form_groups(snapshot, estimator.capacities(snapshot))
        plan = self.policy.plan(snapshot, groups, estimator, self.moves, self.seed)
        return with_estimates(plan, ends_of(plan, snapshot, estimator))

    def _run(
        self,
        snapshot: Snapshot,
        number: int,
        work: Work,
        tenant: str,
        window_s: float,
        on_miss: OnMiss,
    ) -> RunView:
        hosted = [
            model
            for view in snapshot.instances
            if view.state in SERVING
            for model in view.models
            if model.name == work.model
        ]
        kind = hosted[0].kind if hosted else EngineKind.GENERATE
        limit = max((model.max_model_len for model in hosted), default=0) or _UNBOUNDED
        embeds = kind is EngineKind.EMBED
        return RunView(
            # Runs of the store have positive numbers.
            run_id=-number,
            generation=1,
            batch_id=_ASKED,
            tenant=tenant,
            model=work.model,
            kind=kind,
            slo_class=SloClass.BATCH,
            deadline=snapshot.now + window_s,
            created_at=snapshot.now,
            on_miss=on_miss,
            slices=max(1, math.ceil(work.requests / self.slice_requests)),
            requests=work.requests,
            prompt_tokens=work.prompt_tokens,
            max_tokens=0 if embeds else work.max_tokens + work.unbounded * limit,
            prompts=work.prompts,
        )


def _newly_late(before: Plan, after: Plan) -> tuple[str, ...]:
    """Batches more likely late than not afterwards, and not before."""
    return tuple(
        sorted(
            batch_id
            for batch_id, estimate in after.estimates.items()
            if batch_id in before.estimates
            and (estimate.miss_probability or 0.0) > MISS_REFUSED
            and (before.estimates[batch_id].miss_probability or 0.0) <= MISS_REFUSED
        )
    )
