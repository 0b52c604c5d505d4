"""Position of a run, where it stops, and intervals between: pure arithmetic."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from hpctrain.config.schema import TrainingSection


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Position of a run in its steps, epochs and samples, between two steps.

    Attributes:
        step: global batches consumed, skipped ones included.
        epoch: the running pass over the data, from 0.
        position: samples of this epoch consumed by all ranks together.
        samples_seen: samples consumed by all ranks together since the run began.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    samples_seen: int = 0

    def after(self, batch_samples: int, epoch_samples: int) -> Position:
        """Return the place after a global batch of `batch_samples`."""
        position = self.position + batch_samples
        ended = position >= epoch_samples
        return Position(
            step=self.step + 1,
            epoch=self.epoch + ended,
            position=0 if ended else position,
            samples_seen=self.samples_seen + batch_samples,
        )

    def to_json(self) -> dict[str, int]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class StopAt:
    """The end of a run: whichever of its limits comes first.

    Attributes:
        epoch_samples: samples that one epoch serves.
        global_batch_size: samples of a full global batch.
    """

    max_epochs: int | None
    max_steps: int | None
    max_samples: int | None
    epoch_samples: int
    global_batch_size: int

    @classmethod
    def of(cls, section: TrainingSection, epoch_samples: int, global_batch_size: int) -> StopAt:
        """Take the limits from the config."""
        return cls(
            max_epochs=section.max_epochs,
            max_steps=section.max_steps,
            max_samples=section.max_samples,
            epoch_samples=epoch_samples,
            global_batch_size=global_batch_size,
        )

    @property
    def epoch_steps(self) -> int:
        return _ceil_div(self.epoch_samples, self.global_batch_size)

    def reached(self, place: Position) -> bool:
        """Tell whether a run at `place` is complete."""
        return self.total_steps(place) <= place.step

    def further(self, place: Position) -> dict[str, int]:
        """Return, for the limits that have ended a run at `place`, such as leave as much to do.

        By their names in the config. The others hold on.
        """
        stands = (
            ("max_epochs", self.max_epochs, place.epoch),
            ("max_steps", self.max_steps, place.step),
            ("max_samples", self.max_samples, place.samples_seen),
        )
        return {
            name: 2 * max(most, now)
            for name, most, now in stands
            if most is not None and now >= most
        }

    def total_steps(self, place: Position) -> int:
        """Return the step at which a run that now stands at `place` will be complete.

        The same number comes out at every place of a run whose limits and batch size stay.
        """
        remaining = []
        if self.max_epochs is not None:
            epochs_left = self.max_epochs - place.epoch
            if epochs_left <= 0:
                return place.step
            running = _ceil_div(self.epoch_samples - place.position, self.global_batch_size)
            remaining.append(running + (epochs_left - 1) * self.epoch_steps)
        if self.max_steps is not None:
            remaining.append(self.max_steps - place.step)
        if self.max_samples is not None:
            remaining.append(self._steps_to_samples(place, self.max_samples - place.samples_seen))
        return place.step + max(0, min(remaining))

    def end(self, place: Position) -> Position:
        """Return the place at which a run that now stands at `place` will be complete."""
        steps = self.total_steps(place) - place.step
        left = _ceil_div(self.epoch_samples - place.position, self.global_batch_size)
        if steps < left:
            return self._ahead(place, steps)
        whole, rest = divmod(steps - left, self.epoch_steps)
        seen = self.epoch_samples - place.position + whole * self.epoch_samples
        begun = Position(
            step=place.step + left + whole * self.epoch_steps,
            epoch=place.epoch + 1 + whole,
            samples_seen=place.samples_seen + seen,
        )
        return self._ahead(begun, rest)

    def _ahead(self, place: Position, steps: int) -> Position:
        """Return the place some full batches further on in the same epoch."""
        samples = steps * self.global_batch_size
        return Position(
            step=place.step + steps,
            epoch=place.epoch,
            position=place.position + samples,
            samples_seen=place.samples_seen + samples,
        )

    def _steps_to_samples(self, place: Position, samples: int) -> int:
        """Return how many steps from `place` see at least `samples` samples.

        The last batch of an epoch may be smaller, so whole epochs are counted first.
        """
        if samples <= 0:
            return 0
        left = self.epoch_samples - place.position
        if samples <= left:
            return _ceil_div(samples, self.global_batch_size)
        epochs, rest = divmod(samples - left, self.epoch_samples)
        return (
            _ceil_div(left, self.global_batch_size)
            + epochs * self.epoch_steps
            + _ceil_div(rest, self.global_batch_size)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Something done every so many steps, every so many epochs, or both; 0 is never."""

    every_steps: int = 0
    every_epochs: int = 0

    @property
    def is_never(self) -> bool:
        return not (self.every_steps or self.every_epochs)

    def next_step(self, step: int) -> int | None:
        """Return the first step after `step` at which it is time; None: epochs alone decide."""
        return step - step % self.every_steps + self.every_steps if self.every_steps else None

    def due(self, place: Position) -> bool:
        """Tell whether it is time, at `place`."""
        if self.every_steps and place.step % self.every_steps == 0:
            return True
        return bool(
            self.every_epochs and place.position == 0 and place.epoch % self.every_epochs == 0
        )


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
