"""Output lengths: what finished and running requests say about those still to come.

Kaplan–Meier over a forgotten history. A tenant's history leans on its model's, and that one on a
prior, in proportion to how much each has seen. How fast to forget is learned too: lengths that
jump want a short memory, steady ones a long one.

An answer that a bound on its tokens cut tells only that it would have been longer. Where a mean of
lengths is asked for, it counts as what was to be expected of it then (Buckley and James 1979).

Prompts say what they can: requests made from one template have prompts of about one length, and
their answers are alike. So the mean answer to prompts of each length is kept, and work whose
prompts differ from those of the history is expected to differ in proportion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from qlm_batch.domain.buckets import PromptMix, prompt_bucket
from qlm_batch.domain.jobs import EngineKind
from qlm_batch.domain.snapshot import Output
from qlm_batch.scheduling.lengths import NO_AGES, Ages, LengthDistribution, kaplan_meier, prior
from qlm_batch.scheduling.loops import loops

Floats = NDArray[np.float64]

DECAYS = (0.93, 0.98, 1.0)
"""What one newer observation leaves of a weight, by memory: windows of 14, 50, and all there is."""
REGIME = 1000.0
"""Observations after which the best memory is expected to have become another one."""
CHUNK = 20
"""Observations judged together: no more than the shortest memory holds."""
SURPRISE = 9.0
"""The most a chunk counts against a memory, in squared standard errors: tails are heavy."""
HISTORY = 400
"""Lengths kept per model."""
TENANTS = 32
"""Tenants remembered apart per model, the most recent ones."""
TENANT_HISTORY = 200
LEAN_ON_MODEL = 16.0
"""Observations' worth of a model's distribution inside a tenant's."""
LEAN_ON_PRIOR = 8.0
"""Observations' worth of the prior inside a model's."""

PROMPT_DECAY = 0.99
"""As DECAYS, per observation of one bucket of prompts: what a template brings changes slowly."""
LEAN_ON_ALL = 5.0
"""Observations' worth of all prompts' mean inside that of one bucket."""
MOST_FACTOR = 8.0
"""Prompts change the expected length at most by this factor, up or down."""


_EVEN = (1.0 / len(DECAYS),) * len(DECAYS)


@dataclass(frozen=True, slots=True)
class History:
    """Lengths of finished requests, newest last, buckets of their prompts, and which were cut.

    `trust` is the share of each memory in what is expected.
    """

    lengths: tuple[int, ...] = ()
    prompts: tuple[int, ...] = ()
    trust: tuple[float, ...] = _EVEN
    cut: tuple[bool, ...] = ()

    def after(
        self,
        outputs: Sequence[Output],
        most: int,
        relative: Floats,
        uncut: Callable[[Sequence[int], Sequence[bool]], Floats],
    ) -> History:
        """With newer ones, at most so many in all.

        `relative` is what prompts were known to bring, `uncut` says how long answers would have
        been. A memory is trusted as its expectations came true: the posterior of a mixture with
        normal errors, in which shares are redistributed at the pace of REGIME (Herbster and Warmuth
        1998).
        """
        every = (*self.lengths, *(ended.tokens for ended in outputs))
        asked = (*self.prompts, *(prompt_bucket(ended.prompt_tokens) for ended in outputs))
        cut = (*self.cut, *(ended.cut for ended in outputs))
        trust = loops().trusted(
            np.array(self.trust),
            uncut(every, cut),
            relative[np.array(asked, dtype=np.int64)],
            len(self.lengths),
            _memories(most),
            CHUNK,
            SURPRISE,
            REGIME,
        )
        return History(every[-most:], asked[-most:], tuple(trust.tolist()), cut[-most:])

    @property
    def weights(self) -> Floats:
        """What each length counts, the newest 1."""
        found: Floats = np.array(self.trust) @ _memories(len(self.lengths))
        return found

    def to_data(self) -> list[list[int] | list[float]]:
        """As plain JSON values."""
        cut = [int(each) for each in self.cut]
        return [list(self.lengths), list(self.prompts), list(self.trust), cut]

    @staticmethod
    def from_data(data: object, most: int) -> History:
        """What `to_data` wrote; an empty one from anything else.

        The release before did not tell what was cut.
        """
        if not isinstance(data, list | tuple) or len(data) not in (3, 4):
            return History()
        lengths, prompts = (tuple(map(int, column))[-most:] for column in data[:2])
        trust = tuple(map(float, data[2]))
        cut = tuple(map(bool, data[3]))[-most:] if len(data) == 4 else (False,) * len(lengths)
        whole = len(lengths) == len(prompts) == len(cut) and len(trust) == len(DECAYS)
        return History(lengths, prompts, trust, cut) if whole else History()


@dataclass(frozen=True, slots=True)
class Seen:
    """Forgotten sums over the answers to prompts of one bucket: how many, and their tokens."""

    weight: float = 0.0
    tokens: float = 0.0

    def after(self, lengths: Iterable[float]) -> Seen:
        """With these, in their order."""
        weight, tokens = self.weight, self.tokens
        for length in lengths:
            weight, tokens = weight * PROMPT_DECAY + 1.0, tokens * PROMPT_DECAY + length
        return Seen(weight, tokens)


@dataclass(frozen=True)
class LengthBook:
    """What one model's requests finished with, overall, by tenant and by length of prompt."""

    overall: History = field(default_factory=History)
    tenants: Mapping[str, History] = field(default_factory=dict)
    by_prompt: Mapping[int, Seen] = field(default_factory=dict)

    @property
    def unknown(self) -> float:
        """The prior's share in what `distribution` expects of the model, in (0, 1]."""
        return LEAN_ON_PRIOR / (LEAN_ON_PRIOR + self._telling)

    @cached_property
    def _telling(self) -> float:
        """Answers seen; a cut one counts by how likely it would have been seen to end."""
        if not any(self.overall.cut):
            return len(self.overall.lengths)
        usual = prior(EngineKind.GENERATE)
        up_to = np.array(self.overall.lengths)[:, None] >= usual.values
        return float(np.where(self.overall.cut, up_to @ usual.probabilities, 1.0).sum())

    @property
    def mean_error(self) -> float:
        """The relative standard error of the model's mean length, known from so few; 0 of none."""
        if len(self.overall.lengths) < 2:
            return 0.0
        weights = self.overall.weights / self.overall.weights.sum()
        lengths = self._lengths
        mean = max(1.0, float(weights @ lengths))
        return float(np.sqrt((weights @ (lengths - mean) ** 2) * (weights @ weights))) / mean

    def seen(self, outputs: Iterable[Output]) -> LengthBook:
        """The book after these requests, in the order they finished."""
        every = tuple(outputs)
        new: dict[str, list[Output]] = {}
        brought: dict[int, list[float]] = {}
        lengths = self._uncut([ended.tokens for ended in every], [ended.cut for ended in every])
        for ended, length in zip(every, lengths.tolist(), strict=True):
            brought.setdefault(prompt_bucket(ended.prompt_tokens), []).append(length)
            # Taken out and put back: a dict keeps order, so the least recent tenant stands first.
            own = new.pop(ended.tenant, None) or []
            own.append(ended)
            new[ended.tenant] = own
        by_prompt = dict(self.by_prompt)
        for prompt, own_lengths in brought.items():
            by_prompt[prompt] = by_prompt.get(prompt, _NONE).after(own_lengths)
        relative = self._relative(self._usual, most=max(by_prompt, default=0))
        tenants = {name: own for name, own in self.tenants.items() if name not in new}
        for name, own in new.items():
            before = self.tenants.get(name) or History()
            tenants[name] = before.after(own, TENANT_HISTORY, relative, self._uncut)
        recent = dict(list(tenants.items())[-TENANTS:])
        overall = self.overall.after(every, HISTORY, relative, self._uncut)
        return LengthBook(overall, recent, by_prompt)

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
                of_model = _estimate(self.overall, ages, 1.0, of_model, LEAN_ON_PRIOR)
        history = self.tenants.get(tenant or "")
        if history is None or not history.lengths:
            return of_model
        many = len(history.lengths)
        share = min(1.0, many / count) if count else 1.0
        return _estimate(history, ages, share, of_model, LEAN_ON_MODEL)

    def answers(self, tenant: str | None = None) -> Answers:
        """How a tenant's work with given prompts differs from what `distribution` expects."""
        usual = self._usual
        if usual is None:
            return Answers(np.ones(0), 1.0)
        relative = self._relative(usual, most=max(self.by_prompt, default=0))
        typical = _mean_of(relative, self.overall)
        history = self.tenants.get(tenant or "")
        if history is not None and history.lengths:
            weight = len(history.lengths)
            own_typical = _mean_of(relative, history)
            typical = (weight * own_typical + LEAN_ON_MODEL * typical) / (weight + LEAN_ON_MODEL)
        return Answers(relative, typical)

    @cached_property
    def _known(self) -> LengthDistribution:
        """The lengths of the model's answers; embeddings have none that could be cut."""
        return self.distribution(EngineKind.GENERATE)

    def _uncut(self, lengths: Sequence[int], cut: Sequence[bool]) -> Floats:
        """These lengths, the cut ones with what is to be expected beyond."""
        found = np.array(lengths, dtype=np.float64)
        if any(cut):
            beyond, _ = self._known.residuals(found)
            found += np.where(cut, beyond, 0.0)
        return found

    @cached_property
    def _lengths(self) -> Floats:
        """The model's lengths, as they would have been."""
        return self._uncut(self.overall.lengths, self.overall.cut)

    @cached_property
    def _usual(self) -> float | None:
        """The mean length; None while nothing was seen."""
        if not self.overall.lengths:
            return None
        weights = self.overall.weights
        return max(1e-9, float(weights @ self._lengths) / float(weights.sum()))

    def _relative(self, usual: float | None, *, most: int) -> Floats:
        """What prompts of each bucket up to `most` bring, relative to all; 1 where unknown."""
        relative = np.ones(1 + most)
        if usual is not None:
            for bucket, own in self.by_prompt.items():
                relative[bucket] = (own.tokens + LEAN_ON_ALL * usual) / (
                    (own.weight + LEAN_ON_ALL) * usual
                )
        return relative

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


def _mean_of(relative: Floats, history: History) -> float:
    """The mean of what its prompts bring, the newest weighing most."""
    weights = history.weights
    return float(weights @ relative[np.array(history.prompts)]) / float(weights.sum())


@lru_cache(maxsize=2 * HISTORY)
def _memories(count: int) -> Floats:
    """By memory and observation, newest last, what each counts."""
    ages = np.arange(count - 1, -1, -1, dtype=np.float64)
    found: Floats = np.array(DECAYS)[:, None] ** ages
    found.setflags(write=False)
    return found


def _estimate(
    history: History, ages: Ages, share: float, of_all: LengthDistribution, lean: float
) -> LengthDistribution:
    """What a history lets expect that leans on `of_all`; the ages' `share` is its own."""
    lengths, weights = np.array(history.lengths, dtype=np.float64), history.weights
    total, count = float(weights.sum()), len(history.lengths)
    mean = max(1.0, float(weights @ lengths) / total)
    # Little's law: while one request produces a token, running/mean requests finish, and each
    # makes the history forget one part in `total`. Cut ones do so too, at the length they have.
    fading = ages.running * share / mean / total
    age_weight = share * ages.weight
    if any(history.cut):
        # Where its cut answers ended, a history knows less the further one looks: what it leans on
        # has to be at risk beside it, not mixed in afterwards.
        return kaplan_meier(
            lengths, weights, ages.begun, age_weight=age_weight, fading=fading,
            cut=history.cut, assumed=of_all, lean=lean * total / count,
        )  # fmt: skip
    own = kaplan_meier(lengths, weights, ages.begun, age_weight=age_weight, fading=fading)
    return own.mixed(count, of_all, lean)
