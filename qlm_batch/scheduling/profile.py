"""What the estimator remembers, in and out of the store's opaque profiles.

Speeds stand under (model, device); lengths and calibration belong to the model wherever it runs,
so they stand under (model, "*"). What tenants were served stands under ("*", "*").
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from qlm_batch.domain.jobs import SloClass
from qlm_batch.domain.snapshot import Observation, Profile
from qlm_batch.scheduling.calibration import Calibration
from qlm_batch.scheduling.fairness import Served
from qlm_batch.scheduling.lengths import LengthBook
from qlm_batch.scheduling.speed import Speed, prior_step_time

ANY_DEVICE = "*"
ANY_MODEL = "*"


@dataclass(frozen=True, slots=True)
class Knowledge:
    """Everything learned so far, typed."""

    books: Mapping[str, LengthBook] = field(default_factory=dict)
    speeds: Mapping[tuple[str, str], Speed] = field(default_factory=dict)
    calibrations: Mapping[str, Calibration] = field(default_factory=dict)
    served: Served = field(default_factory=Served)

    @staticmethod
    def of(profiles: Iterable[Profile]) -> Knowledge:
        """Read profiles; data of unknown shape counts as nothing learned."""
        books: dict[str, LengthBook] = {}
        speeds: dict[tuple[str, str], Speed] = {}
        calibrations: dict[str, Calibration] = {}
        served = Served()
        for profile in profiles:
            if profile.model == ANY_MODEL:
                served = Served.from_data(profile.data.get("served"))
            elif profile.device == ANY_DEVICE:
                books[profile.model] = LengthBook.from_data(profile.data.get("lengths"))
                calibrations[profile.model] = Calibration.from_data(profile.data.get("calibration"))
            else:
                start = prior_step_time(profile.model, profile.device)
                key = (profile.model, profile.device)
                speeds[key] = Speed.from_data(start, profile.data.get("speed"))
        return Knowledge(books, speeds, calibrations, served)

    def book(self, model: str) -> LengthBook:
        """The model's lengths; empty for one not seen yet."""
        return self.books.get(model) or LengthBook()

    def speed(self, model: str, device: str) -> Speed:
        """The pair's speed; its prior for one not seen yet."""
        return self.speeds.get((model, device)) or Speed(prior_step_time(model, device))

    def calibration(self, model: str) -> Calibration:
        """The model's calibration; a fresh one for a model not seen yet."""
        return self.calibrations.get(model) or Calibration()

    def profiles(self) -> tuple[Profile, ...]:
        """All of it as profiles, in a fixed order."""
        models = sorted(self.books.keys() | self.calibrations.keys())
        by_model = [
            Profile(
                model,
                ANY_DEVICE,
                {
                    "lengths": self.book(model).to_data(),
                    "calibration": self.calibration(model).to_data(),
                },
            )
            for model in models
        ]
        by_pair = [
            Profile(model, device, {"speed": speed.to_data()})
            for (model, device), speed in sorted(self.speeds.items(), key=lambda item: item[0])
        ]
        tenants = Profile(ANY_MODEL, ANY_DEVICE, {"served": self.served.to_data()})
        return (*((tenants,) if self.served.tokens else ()), *by_model, *by_pair)

    def observed(self, observations: Sequence[Observation]) -> Knowledge:
        """What is known after these reports, oldest first."""
        books, speeds = dict(self.books), dict(self.speeds)
        for seen in observations:
            if seen.outputs:
                books[seen.model] = books.get(seen.model, LengthBook()).seen(seen.outputs)
            if seen.steps or seen.seconds > 0.0:
                key = (seen.model, seen.device)
                before = speeds.get(key) or self.speed(seen.model, seen.device)
                speeds[key] = before.after_steps(seen.steps).after_busy(
                    seen.tokens, seen.requests, seen.seconds, seen.steps
                )
        served = self.served.after(observations)
        return replace(self, books=books, speeds=speeds, served=served)

    def waited(self, outcomes: Iterable[tuple[str, SloClass, float, float]]) -> Knowledge:
        """What is known after these waits: (model, class, predicted seconds, actual seconds)."""
        calibrations = dict(self.calibrations)
        for model, slo_class, predicted_s, actual_s in outcomes:
            before = calibrations.get(model, Calibration())
            calibrations[model] = before.after(slo_class, predicted_s, actual_s)
        return replace(self, calibrations=calibrations)


def fold(profiles: Sequence[Profile], observations: Sequence[Observation]) -> tuple[Profile, ...]:
    """The profiles after these reports; unchanged ones come back equal to what went in."""
    if not observations:
        return tuple(profiles)
    return Knowledge.of(profiles).observed(observations).profiles()
