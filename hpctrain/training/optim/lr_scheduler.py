"""The LR scheduler: a warm-up, then a schedule, in steps, epochs or samples."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, ClassVar, Protocol

from hpctrain.config.schema import SchedulerSection, Unit
from hpctrain.errors import ConfigError, TrainingError
from hpctrain.training.optim.schedules import Factor, Plateau
from hpctrain.training.position import Position, StopAt


class Schedule(Protocol):
    """What a run asks of its schedule, and reports to it.

    Attributes:
        in_groups: whether the learning rates are in the optimizer's groups by themselves, and are
            not to be set before a step; else `advance` and `advance_monitored` have nothing to do.
        notes: what the header should say of it.
    """

    in_groups: ClassVar[bool]

    @property
    def notes(self) -> Sequence[str]:
        """What the header should say of it."""
        ...

    def __call__(self, place: Position, end: Position) -> float:
        """Return the learning rate of the step that begins at `place`."""
        ...

    def until(self, end: Position) -> Callable[[Position], float]:
        """Return the same for all steps of a run that will be complete at `end`."""
        ...

    def rates(self) -> Mapping[str, float]:
        """Return further learning rates of the last step, by name."""
        ...

    def watch(self, metrics: Mapping[str, Any]) -> None:
        """Learn which metrics an evaluation gives."""
        ...

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Take note of an evaluation."""
        ...

    def advance(self, place: Position) -> None:
        """Take note of the step that led to `place`."""
        ...

    def advance_monitored(self, place: Position) -> None:
        """Take note that all that is measured at `place` is known."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningRate:
    """A function of the place in the run; with "plateau", of the evaluations so far too.

    Attributes:
        peak: what the schedule's factors are of.
        factor: the schedule.
        arguments: of `factor`.
        unit: that the schedule counts in.
        warmup: so much rises in a straight line from near 0 to the peak.
        warmup_unit: what `warmup` is counted in.
        stop_at: how long an epoch is.
        in_groups: whether learning rates are in the optimizer's groups, and only read here.
    """

    in_groups: ClassVar[bool] = False
    notes: ClassVar[Sequence[str]] = ()

    peak: float
    factor: Factor
    stop_at: StopAt
    arguments: Mapping[str, Any] = field(default_factory=dict)
    unit: Unit = "steps"
    warmup: float = 0
    warmup_unit: Unit = "steps"

    @classmethod
    def of(
        cls, section: SchedulerSection, target: Factor, peak: float, stop_at: StopAt
    ) -> LearningRate:
        """Build what the config asks for.

        Args:
            section: of the config.
            target: a function as in `hpctrain.training.optim.schedules`, or a class of such
                functions, which is built with the arguments of the section.
            peak: learning rate that the schedule starts at.
            stop_at: of the run.

        Raises:
            ConfigError: if a class refuses its arguments.
        """
        factor: Any = target
        arguments: Mapping[str, Any] = section.arguments
        if inspect.isclass(target):
            try:
                factor, arguments = target(**arguments), {}
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f'[scheduler] use = "{section.use}" refuses its arguments: {error}'
                ) from error
        warmup_unit: Unit = "steps"
        if section.warmup_epochs:
            warmup_unit = "epochs"
        elif section.warmup_samples:
            warmup_unit = "samples"
        return cls(
            peak=peak,
            factor=factor,
            arguments=arguments,
            unit=section.unit,
            warmup=section.warmup_steps or section.warmup_epochs or section.warmup_samples,
            warmup_unit=warmup_unit,
            stop_at=stop_at,
        )

    def __call__(self, place: Position, end: Position) -> float:
        """Return the learning rate of the step that begins at `place`.

        Args:
            place: where the run stands.
            end: where it will be complete.

        Raises:
            TrainingError: if a schedule of the user's gives no number from 0.
        """
        return self.until(end)(place)

    def until(self, end: Position) -> Callable[[Position], float]:
        """Return the learning rate by place, for a run that will be complete at `end`.

        What does not change from step to step is reckoned here.
        """
        peak, factor, arguments = self.peak, self.factor, self.arguments
        warmup, warmed, done = (
            self.warmup,
            self._progress(self.warmup_unit),
            self._progress(self.unit),
        )
        step = self._convert(1, "steps", self.warmup_unit) if warmup else 0
        offset = self._convert(warmup, self.warmup_unit, self.unit) if warmup else 0
        total = max(0, done(end) - offset)

        def rate(place: Position) -> float:
            if warmup and (risen := warmed(place)) < warmup:
                return peak * (risen + step) / (warmup + step)
            now = max(0, done(place) - offset)
            value = factor(now, total, **arguments)
            if not 0 <= value < math.inf:
                raise self._no_factor(value, now, total)
            return peak * value

        return rate

    def _no_factor(self, value: object, done: float, total: float) -> TrainingError:
        name = getattr(self.factor, "__qualname__", self.factor)
        return TrainingError(
            f"the schedule {name} gave {value!r} after {done} of {total} {self.unit} since the "
            "warm-up: a factor is a number from 0"
        )

    def rates(self) -> Mapping[str, float]:
        """Return none: groups of the config have a factor of the one learning rate."""
        return {}

    def advance(self, place: Position) -> None:
        """Do nothing: where a run stands is asked with the rate."""

    def advance_monitored(self, place: Position) -> None:
        """Do nothing, see `observe`."""

    def watch(self, metrics: Mapping[str, Any]) -> None:
        """Tell a schedule that needs evaluations what they give.

        Raises:
            ConfigError: if that is not what it needs.
        """
        if isinstance(self.factor, Plateau):
            self.factor.watch(metrics)

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Take note of an evaluation."""
        if isinstance(self.factor, Plateau):
            self.factor.observe(metrics)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON; most schedules have none."""
        return self.factor.state_dict() if isinstance(self.factor, Plateau) else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; one of another schedule says nothing."""
        if isinstance(self.factor, Plateau):
            self.factor.load_state_dict(state)

    def _progress(self, unit: Unit) -> Callable[[Position], float]:
        """Return how far the run has come, by place; whole numbers of steps and samples stay."""
        if unit == "steps":
            return attrgetter("step")
        if unit == "samples":
            return attrgetter("samples_seen")
        epoch_samples = self.stop_at.epoch_samples
        return lambda place: place.epoch + place.position / epoch_samples

    def _convert(self, amount: float, unit: Unit, to: Unit) -> float:
        """Return the same time in another unit, exact at the ends of epochs."""
        if unit == to:
            return amount
        sizes: dict[Unit, float] = {
            "epochs": 1,
            "steps": self.stop_at.epoch_samples / self.stop_at.global_batch_size,
            "samples": self.stop_at.epoch_samples,
        }
        return amount * sizes[to] / sizes[unit]
