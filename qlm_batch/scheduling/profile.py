"""What the estimator remembers, in and out of the store's opaque profiles.

Speeds stand under (model, device); lengths and calibration belong to the model wherever it runs,
so they stand under (model, "*"). What tenants were served stands under ("*", "*").
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from qlm_batch.domain.snapshot import Observation, Output, Profile
from qlm_batch.scheduling.calibration import Conformal, Quantiles
from qlm_batch.scheduling.fairness import Served
from qlm_batch.scheduling.lengthbook import LengthBook
from qlm_batch.scheduling.speed import Speed, prior_step_time

ANY_DEVICE = "*"
ANY_MODEL = "*"


@dataclass(frozen=True, slots=True)
class Knowledge:
    """Everything learned so far, typed; `read` are the profiles it is the meaning of."""

    books: Mapping[str, LengthBook] = field(default_factory=dict)
    speeds: Mapping[tuple[str, str], Speed] = field(default_factory=dict)
    calibrations: Mapping[str, Conformal] = field(default_factory=dict)
    served: Served = field(default_factory=Served)
    read: Mapping[tuple[str, str], Profile] = field(default_factory=dict, compare=False)

    @staticmethod
    def of(profiles: Iterable[Profile], before: Knowledge | None = None) -> Knowledge:
        """Read profiles; data of unknown shape counts as nothing learned.

        What `before` read from equal profiles is taken over, all of it as `before` itself.
        """
        known, profiles = before or Knowledge(), tuple(profiles)
        if len(profiles) == len(known.read) and all(
            known.read.get((profile.model, profile.device)) == profile for profile in profiles
        ):
            return known
        books: dict[str, LengthBook] = {}
        speeds: dict[tuple[str, str], Speed] = {}
        calibrations: dict[str, Conformal] = {}
        served = Served()
        read: dict[tuple[str, str], Profile] = {}
        for profile in profiles:
            model, key = profile.model, (profile.model, profile.device)
            read[key] = profile
            same = known.read.get(key) == profile
            if model == ANY_MODEL:
                served = known.served if same else Served.from_data(profile.data.get("served"))
            elif profile.device == ANY_DEVICE:
                if same:
                    books[model], calibrations[model] = known.book(model), known.calibration(model)
                else:
                    books[model] = LengthBook.from_data(profile.data.get("lengths"))
                    calibrations[model] = Conformal.from_data(profile.data.get("calibration"))
            elif same:
                speeds[key] = known.speed(*key)
            else:
                start = prior_step_time(*key)
                speeds[key] = Speed.from_data(start, profile.data.get("speed"))
        return Knowledge(books, speeds, calibrations, served, read)

    def is_news(self, before: Knowledge) -> bool:
        """Whether more is known of lengths or speeds; how promises came true is no such news."""
        return self.books is not before.books or self.speeds is not before.speeds

    def book(self, model: str) -> LengthBook:
        """The model's lengths; empty for one not seen yet."""
        return self.books.get(model) or LengthBook()

    def speed(self, model: str, device: str) -> Speed:
        """The pair's speed; its prior for one not seen yet."""
        return self.speeds.get((model, device)) or Speed(prior_step_time(model, device))

    def calibration(self, model: str) -> Conformal:
        """The model's calibration; a fresh one for a model not seen yet."""
        return self.calibrations.get(model) or Conformal()

    def quantiles(self, model: str) -> Quantiles:
        """How much later than foreseen the model's batches end."""
        return self.calibration(model).quantiles().widened()

    def profiles(self) -> tuple[Profile, ...]:
        """All of it as profiles, in a fixed order."""
        return tuple(self.written().read.values())

    def written(self) -> Knowledge:
        """The same with profiles of all of it in `read`."""
        read: dict[tuple[str, str], Profile] = {}
        key = (ANY_MODEL, ANY_DEVICE)
        if self.served.tokens:
            read[key] = self.read.get(key) or Profile(*key, {"served": self.served.to_data()})
        for model in sorted(self.books.keys() | self.calibrations.keys()):
            key = (model, ANY_DEVICE)
            read[key] = self.read.get(key) or Profile(
                *key,
                {
                    "lengths": self.book(model).to_data(),
                    "calibration": self.calibration(model).to_data(),
                },
            )
        for key, speed in sorted(self.speeds.items(), key=lambda item: item[0]):
            read[key] = self.read.get(key) or Profile(*key, {"speed": speed.to_data()})
        return replace(self, read=read)

    def observed(self, observations: Sequence[Observation]) -> Knowledge:
        """What is known after these reports, oldest first."""
        if not observations:
            return self
        books, speeds, read = dict(self.books), dict(self.speeds), dict(self.read)
        read.pop((ANY_MODEL, ANY_DEVICE), None)
        outputs: dict[str, list[Output]] = {}
        work: dict[tuple[str, str], list[Observation]] = {}
        for seen in observations:
            if seen.outputs:
                outputs.setdefault(seen.model, []).extend(seen.outputs)
            if seen.steps or seen.seconds > 0.0:
                work.setdefault((seen.model, seen.device), []).append(seen)
        for model, ended in outputs.items():
            read.pop((model, ANY_DEVICE), None)
            books[model] = self.book(model).seen(ended)
        for key, own in work.items():
            read.pop(key, None)
            steps = [row for seen in own for row in seen.steps]
            speeds[key] = (
                self.speed(*key)
                .after_steps(steps)
                .after_busy(
                    sum(seen.tokens for seen in own),
                    sum(seen.requests for seen in own),
                    sum(seen.seconds for seen in own),
                    steps,
                )
            )
        served = self.served.after(observations)
        return replace(self, books=books, speeds=speeds, served=served, read=read)

    def ended(
        self, outcomes: Iterable[tuple[str, float]], overdue: Mapping[str, tuple[float, ...]]
    ) -> Knowledge:
        """What is known after these scores of batches that ended, and by model of overdue ones."""
        calibrations, read = dict(self.calibrations), dict(self.read)
        for model, outcome in outcomes:
            calibrations[model] = calibrations.get(model, Conformal()).after(outcome)
        for model in calibrations.keys() | overdue.keys():
            own = calibrations.get(model, Conformal())
            calibrations[model] = replace(own, overdue=overdue.get(model, ()))
            if calibrations[model] != self.calibrations.get(model):
                read.pop((model, ANY_DEVICE), None)
        return replace(self, calibrations=calibrations, read=read)


def fold(profiles: Sequence[Profile], observations: Sequence[Observation]) -> tuple[Profile, ...]:
    """The profiles after these reports; unchanged ones come back equal to what went in."""
    if not observations:
        return tuple(profiles)
    return Knowledge.of(profiles).observed(observations).profiles()
