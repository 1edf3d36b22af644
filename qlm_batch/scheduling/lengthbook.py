"""Output lengths: what finished and running requests say about those still to come.

Kaplan–Meier over an exponentially forgotten history. A tenant's history leans on its model's, and
that one on a prior, in proportion to how much each has seen.

Prompts say what they can: requests made from one template have prompts of about one length, and
their answers are alike. So the mean answer to prompts of each length is kept, and work whose
prompts differ from those of the history is expected to differ in proportion.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from qlm_batch.domain.buckets import PromptMix, prompt_bucket
from qlm_batch.domain.jobs import EngineKind
from qlm_batch.domain.snapshot import Output
from qlm_batch.scheduling.lengths import NO_AGES, Ages, LengthDistribution, kaplan_meier, prior

Floats = NDArray[np.float64]

DECAY = 0.992
"""What one newer observation leaves of a weight: an effective window of 125 observations."""
HISTORY = 400
"""Lengths kept per model; the oldest of them weighs 0.992^399, 0.04."""
TENANTS = 32
"""Tenants remembered apart per model, the most recent ones."""
TENANT_HISTORY = 200
LEAN_ON_MODEL = 16.0
"""Observations' worth of a model's distribution inside a tenant's."""
LEAN_ON_PRIOR = 8.0
"""Observations' worth of the prior inside a model's."""

PROMPT_DECAY = 0.99
"""As DECAY, per observation of one bucket of prompts: what a template brings changes slowly."""
LEAN_ON_ALL = 5.0
"""Observations' worth of all prompts' mean inside that of one bucket."""
MOST_FACTOR = 8.0
"""Prompts change the expected length at most by this factor, up or down."""


@dataclass(frozen=True, slots=True)
class History:
    """Lengths of finished requests, newest last, and the bucket of each one's prompt."""

    lengths: tuple[int, ...] = ()
    prompts: tuple[int, ...] = ()

    def after(self, lengths: Sequence[int], prompts: Sequence[int], most: int) -> History:
        """With newer ones, at most so many in all."""
        return History(
            (*self.lengths, *lengths)[-most:],
            (*self.prompts, *prompts)[-most:],
        )

    def to_data(self) -> list[list[int]]:
        """As plain JSON values."""
        return [list(self.lengths), list(self.prompts)]

    @staticmethod
    def from_data(data: object, most: int) -> History:
        """What `to_data` wrote; an empty one from anything else."""
        if not isinstance(data, list | tuple) or len(data) != 2:
            return History()
        lengths, prompts = (tuple(int(n) for n in column)[-most:] for column in data)
        return History(lengths, prompts) if len(lengths) == len(prompts) else History()


@dataclass(frozen=True, slots=True)
class Seen:
    """Forgotten sums over the answers to prompts of one bucket: how many, and their tokens."""

    weight: float = 0.0
    tokens: float = 0.0

    def after(self, length: int) -> Seen:
        """With one more."""
        return Seen(self.weight * PROMPT_DECAY + 1.0, self.tokens * PROMPT_DECAY + length)


@dataclass(frozen=True, slots=True)
class LengthBook:
    """What one model's requests finished with, overall, by tenant and by length of prompt."""

    overall: History = field(default_factory=History)
    tenants: Mapping[str, History] = field(default_factory=dict)
    by_prompt: Mapping[int, Seen] = field(default_factory=dict)

    @property
    def unknown(self) -> float:
        """The prior's share in what `distribution` expects of the model, in (0, 1]."""
        count = len(self.overall.lengths)
        return LEAN_ON_PRIOR / (LEAN_ON_PRIOR + float(_weights(count).sum()))

    @property
    def error(self) -> float:
        """The relative standard error of the mean of what was seen; 0 while nothing was."""
        lengths = np.array(self.overall.lengths, dtype=np.float64)
        if not lengths.size:
            return 0.0
        weights = _weights(lengths.size) / _weights(lengths.size).sum()
        mean = max(1.0, float(weights @ lengths))
        var = float(weights @ (lengths - mean) ** 2)
        return math.sqrt(var * float(weights @ weights)) / mean

    def seen(self, outputs: Iterable[Output]) -> LengthBook:
        """The book after these requests, in the order they finished."""
        lengths: list[int] = []
        prompts: list[int] = []
        new: dict[str, tuple[list[int], list[int]]] = {}
        by_prompt = dict(self.by_prompt)
        for tenant, length, prompt_tokens in outputs:
            prompt = prompt_bucket(prompt_tokens)
            by_prompt[prompt] = by_prompt.get(prompt, _NONE).after(length)
            lengths.append(length)
            prompts.append(prompt)
            # Taken out and put back: a dict keeps order, so the least recent tenant stands first.
            own = new.pop(tenant, None) or ([], [])
            own[0].append(length)
            own[1].append(prompt)
            new[tenant] = own
        tenants = {name: own for name, own in self.tenants.items() if name not in new}
        for name, columns in new.items():
            before = self.tenants.get(name) or History()
            tenants[name] = before.after(*columns, TENANT_HISTORY)
        recent = dict(list(tenants.items())[-TENANTS:])
        return LengthBook(self.overall.after(lengths, prompts, HISTORY), recent, by_prompt)

    def distribution(
        self,
        kind: EngineKind,
        tenant: str | None = None,
        ages: Ages = NO_AGES,
        of_model: LengthDistribution | None = None,
    ) -> LengthDistribution:
        """The lengths to expect, given the `ages` of this model's running requests.

        Without a tenant, or for one not seen yet, the model's own distribution: `of_model`, where
        the caller has it.
        """
        count = len(self.overall.lengths)
        if of_model is None:
            of_model = prior(kind)
            if count:
                own = _estimate(self.overall.lengths, ages, 1.0)
                of_model = own.mixed(float(_weights(count).sum()), of_model, LEAN_ON_PRIOR)
        history = self.tenants.get(tenant or "")
        if history is None or not history.lengths:
            return of_model
        many = len(history.lengths)
        own = _estimate(history.lengths, ages, min(1.0, many / count) if count else 1.0)
        return own.mixed(float(_weights(many).sum()), of_model, LEAN_ON_MODEL)

    def answers(self, tenant: str | None = None) -> Answers:
        """How a tenant's work with given prompts differs from what `distribution` expects."""
        overall = self.overall
        if not overall.lengths:
            return Answers(np.ones(0), 1.0)
        weights = _weights(len(overall.lengths))
        total = float(weights.sum())
        usual = max(1e-9, float(weights @ np.array(overall.lengths, dtype=np.float64)) / total)
        relative = np.ones(1 + max(self.by_prompt, default=0))
        for bucket, own in self.by_prompt.items():
            relative[bucket] = (own.tokens + LEAN_ON_ALL * usual) / (
                (own.weight + LEAN_ON_ALL) * usual
            )
        typical = _mean_of(relative, overall.prompts)
        history = self.tenants.get(tenant or "")
        if history is not None and history.lengths:
            weight = float(_weights(len(history.lengths)).sum())
            own_typical = _mean_of(relative, history.prompts)
            typical = (weight * own_typical + LEAN_ON_MODEL * typical) / (weight + LEAN_ON_MODEL)
        return Answers(relative, typical)

    def to_data(self) -> Mapping[str, object]:
        """As plain JSON values."""
        return {
            "overall": self.overall.to_data(),
            "tenants": [[name, *own.to_data()] for name, own in self.tenants.items()],
            "by_prompt": [
                [bucket, own.weight, own.tokens] for bucket, own in sorted(self.by_prompt.items())
            ],
        }

    @staticmethod
    def from_data(data: object) -> LengthBook:
        """The book `to_data` wrote; an empty one from anything else."""
        if not isinstance(data, Mapping) or "overall" not in data:
            return LengthBook()
        return LengthBook(
            History.from_data(data["overall"], HISTORY),
            {
                str(name): History.from_data(columns, TENANT_HISTORY)
                for name, *columns in data.get("tenants", ())
            },
            {
                int(bucket): Seen(float(weight), float(tokens))
                for bucket, weight, tokens in data.get("by_prompt", ())
            },
        )


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """Mean answers by bucket of prompt, `relative` to all; `typical` is the mean of the history."""

    relative: Floats
    typical: float

    def factor(self, prompts: PromptMix) -> float:
        """What to multiply the expected length by for work with these prompts; 1 where unknown."""
        requests, tokens = 0, 0.0
        known = self.relative.size
        for bucket, count in prompts:
            requests += count
            tokens += count * (self.relative.item(bucket) if bucket < known else 1.0)
        if not requests or not known:
            return 1.0
        return min(MOST_FACTOR, max(1.0 / MOST_FACTOR, tokens / requests / self.typical))


_NONE = Seen()


def _mean_of(relative: Floats, prompts: Sequence[int]) -> float:
    """The mean of what these prompts bring, the newest weighing most."""
    weights = _weights(len(prompts))
    return float(weights @ relative[np.array(prompts)]) / float(weights.sum())


@lru_cache(maxsize=HISTORY)
def _weights(count: int) -> Floats:
    newest_last: Floats = DECAY ** np.arange(count - 1, -1, -1, dtype=np.float64)
    newest_last.setflags(write=False)
    return newest_last


def _estimate(history: tuple[int, ...], ages: Ages, share: float) -> LengthDistribution:
    lengths, weights = np.array(history, dtype=np.float64), _weights(len(history))
    mean = max(1.0, float(weights @ lengths) / float(weights.sum()))
    # Little's law: while one request produces a token, running/mean requests finish.
    fading = (1.0 - DECAY) * ages.running * share / mean
    # The ages stand for the tenant's share of them.
    return kaplan_meier(lengths, weights, ages.begun, age_weight=share * ages.weight, fading=fading)
