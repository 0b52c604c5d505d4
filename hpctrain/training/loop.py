"""The training loop: steps, and what happens between two of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from hpctrain.data.loading.loader import TrainLoader
from hpctrain.training.horizon import Cadence, Horizon, Place
from hpctrain.training.step.train_step import TrainStep

Schedule = Callable[[Place, Place], float]
"""(place, end of the run) to the learning rate of the next step."""

Metrics = dict[str, float]


class Hooks(Protocol):
    """What the loop asks of the job around it. All ranks call each at the same place."""

    def advanced(self, place: Place) -> None:
        """Take note of a step. Called after every one, so it must cost next to nothing."""
        ...

    def log(self, place: Place, epoch: int, lr: float) -> None:
        """Write down the step that led to `place`. Collective: all ranks."""
        ...

    def evaluate(self, place: Place, epoch: int) -> Metrics | None:
        """Return the metrics of the validation data, None if stopped. Collective: all ranks."""
        ...

    def check(self, place: Place) -> None:
        """Compare what should be equal on all ranks. Collective: all ranks."""
        ...

    def save(self, place: Place, metrics: Metrics | None) -> None:
        """Save a checkpoint; `metrics` are those of an evaluation at this very place.

        Collective: all ranks.
        """
        ...

    def stop_agreed(self) -> bool:
        """Tell whether all ranks have agreed to stop here. Collective: all ranks."""
        ...

    def save_agreed(self) -> bool:
        """Tell whether the same agreement asks for a save here. The same on all ranks."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """When the loop does what."""

    horizon: Horizon
    log: Cadence
    evaluate: Cadence | None
    check: Cadence
    save: Cadence


def fit(
    place: Place,
    plan: Plan,
    *,
    step: TrainStep,
    loader: TrainLoader,
    schedule: Schedule,
    hooks: Hooks,
    evaluation_owed: bool = False,
) -> tuple[Place, bool]:
    """Train from `place` to the horizon, or until all ranks agree to stop.

    Collective: all ranks.

    With `evaluation_owed` the evaluation at `place`, which a stop has cut short, comes first.

    Returns:
        Where the run stands, and whether it is complete.
    """
    end = plan.horizon.end(place)
    if evaluation_owed and plan.evaluate is not None:
        metrics = hooks.evaluate(place, place.epoch - (place.position == 0))
        if metrics is None:
            return place, False  # the checkpoint that the run came from says all there is
        # That one was saved without these metrics.
        if plan.save.due(place) or place.step == end.step:
            hooks.save(place, metrics)
    while place.step < end.step:
        epoch = place.epoch
        for batch in loader.epoch(epoch, place.position):
            lr = schedule(place, end)
            step(batch, lr)
            place = place.after(batch.global_size, plan.horizon.epoch_samples)
            hooks.advanced(place)

            complete = place.step == end.step
            if complete or plan.log.due(place):
                hooks.log(place, epoch, lr)
            if plan.check.due(place):
                hooks.check(place)
            metrics = None
            if plan.evaluate is not None and (complete or plan.evaluate.due(place)):
                metrics = hooks.evaluate(place, epoch)
                # Without it the run is not done; a later job begins with it.
                complete = complete and metrics is not None
            stopped = hooks.stop_agreed() and not complete
            if complete or stopped or hooks.save_agreed() or plan.save.due(place):
                hooks.save(place, metrics)
            if stopped:
                return place, False
            if complete:
                break
    return place, True
