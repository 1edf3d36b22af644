"""Which models have queued work that nobody will ever take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qlm_batch.domain.snapshot import InstanceState, Residency, Snapshot


@dataclass(frozen=True, slots=True)
class UnservedConfig:
    """How long work waits for an instance that hosts its model.

    `grace_s` while others live; `away_s` where an instance that hosts it is lost or leaving and may
    come back, or could not load it and tries again, or none lives at all. At most `slices_per_pass`
    are failed at once.
    """

    grace_s: float = 30.0
    away_s: float = 900.0
    slices_per_pass: int = 256


class Unserved:
    """Remembers since when each queued model has been without a living instance."""

    def __init__(self, config: UnservedConfig) -> None:
        self._config = config
        self._since: dict[str, float] = {}

    def due(self, snapshot: Snapshot) -> Iterator[tuple[str, str]]:
        """Models whose grace is over, each with the message for its lines."""
        gone = (InstanceState.LOST, InstanceState.DRAINING)
        alive = [view for view in snapshot.instances if view.state not in gone]
        hosted = [(view, model) for view in snapshot.instances for model in view.models]
        served = sorted(
            {
                model.name
                for view, model in hosted
                if view.state not in gone and model.residency is not Residency.FAILED
            }
        )
        away = {model.name for _, model in hosted} - set(served)
        waiting = sorted({run.model for run in snapshot.runs if run.slices > 0} - set(served))
        self._since = {model: self._since.get(model, snapshot.now) for model in waiting}
        for model in waiting:
            patient = model in away or not alive
            limit_s = self._config.away_s if patient else self._config.grace_s
            if snapshot.now - self._since[model] >= limit_s:
                yield model, _message(model, served)


def _message(model: str, served: list[str]) -> str:
    known = ", ".join(f"`{name}`" for name in served)
    remedy = f"Use one of {known}, or start" if served else "Start"
    return f"The model `{model}` is not served here. {remedy} a worker with --model {model}."
