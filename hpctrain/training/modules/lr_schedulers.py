"""LR schedulers of torch as the schedule of a run: stepped on the host, where Lightning steps them.

Source: lightning.pytorch.loops 2.6, `_TrainingEpochLoop.advance`, `on_advance_end`,
`_update_learning_rates` and `_FitLoop.on_advance_end`; compared in
tests/unit/training/modules/test_module_schedulers.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from hpctrain.errors import TrainingError
from hpctrain.training.modules.optimizers import Configured, SchedulerUse
from hpctrain.training.modules.scheduler_state import SchedulerStates
from hpctrain.training.position import Position, StopAt
from hpctrain.utils.text import did_you_mean

logger = logging.getLogger("hpctrain")

StepScheduler = Callable[[Any, Any], None]
"""(scheduler, value of its metric or None): steps it, as `lr_scheduler_step` of a module does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundary:
    """The step that a run has just made, as Lightning counts.

    Attributes:
        batch: number of the step in its epoch, from 0.
        epoch: from 0.
        ends_epoch: whether it was the last one of its epoch.
    """

    batch: int
    epoch: int
    ends_epoch: bool

    @classmethod
    def before(cls, place: Position, stop_at: StopAt) -> Boundary:
        """Return the step that has led to a place."""
        ends_epoch = place.position == 0
        samples = stop_at.epoch_samples if ends_epoch else place.position
        return cls(
            batch=-(-samples // stop_at.global_batch_size) - 1,
            epoch=place.epoch - ends_epoch,
            ends_epoch=ends_epoch,
        )


class ModuleSchedule:
    """The learning rates of an optimizer that a module has made.

    They are in the optimizer's groups, and its schedulers, its callbacks and itself change them
    there; nothing else does.

    Attributes:
        in_groups: they are where the optimizer reads them.
        states: what is saved of it.
        optimizer: whose learning rates.
        uses: its schedulers.
    """

    in_groups: ClassVar[bool] = True

    def __init__(
        self,
        configured: Configured,
        stop_at: StopAt,
        step_scheduler: StepScheduler | None = None,
        metrics: Callable[[], Mapping[str, Any]] | None = None,
    ) -> None:
        """Begin with the optimizer as it was made.

        Args:
            configured: what `configure_optimizers` has returned.
            stop_at: how long an epoch is.
            step_scheduler: steps a scheduler; None: as torch's are.
            metrics: returns all that is known for `monitor`; None: what evaluations gave.
        """
        self.optimizer = configured.optimizer
        self.uses = configured.uses
        self.states = SchedulerStates(configured, stop_at, step_scheduler)
        self._notes = configured.notes
        self._place = configured.place
        self._trained = configured.trained
        self._stop_at = stop_at
        self._step = step_scheduler or step_as_torch
        self._evaluated: dict[str, Any] = {}
        self._metrics = metrics or (lambda: self._evaluated)
        self._monitored = [use for use in self.uses if use.reduce_on_plateau]
        self._others = [use for use in self.uses if not use.reduce_on_plateau]
        self._rates: Sequence[Any] = ()
        self._used: Sequence[Any] = ()
        self._warned: set[str] = set()
        self._differing: set[int] = set()

    def __call__(self, place: Position, end: Position) -> float:
        """Return the first group's learning rate for the step that begins at `place`."""
        return self._rate(place)

    def until(self, end: Position) -> Callable[[Position], float]:
        """Return the same by place: when the run ends makes no difference."""
        return self._rate

    def _rate(self, place: Position) -> float:
        """Return the first group's learning rate, and note those of all.

        Raises:
            TrainingError: if other parameters are trained than at the beginning.
        """
        if self._trained is not None and not place.position:
            self._trained.check()
        self._rates = [_kept(group["lr"]) for group in self.optimizer.param_groups]
        return float(self._rates[0])

    def rates(self) -> dict[str, float]:
        """Return the learning rates of the last step, of groups that differ from the first.

        Or have differed in this job. By the names that Lightning's LearningRateMonitor gives their
        groups, below "lr".
        """
        rates = [float(rate) for rate in self._used]
        self._differing |= {index for index, rate in enumerate(rates) if rate != rates[0]}
        groups = self.optimizer.param_groups
        return {
            f"lr/{groups[index].get('name', f'pg{index + 1}')}": rates[index]
            for index in sorted(self._differing)
        }

    @property
    def notes(self) -> Sequence[str]:
        """What the header should say of it."""
        return [*self._notes, *self.states.notes]

    def advance(self, place: Position) -> None:
        """Step the schedulers that no metric decides about, after the step that led to `place`."""
        self.states.place = place
        self._used = self._rates
        if not self._others:
            return
        made = Boundary.before(place, self._stop_at)
        for use in self._others:
            if is_due(use, made):
                self._step(use.scheduler, None)

    def advance_monitored(self, place: Position) -> None:
        """Step those that a metric decides about, after the evaluation at `place`.

        Raises:
            TrainingError: on every rank, if there is no such metric.
        """
        if not self._monitored:
            return
        made = Boundary.before(place, self._stop_at)
        for use in self._monitored:
            if is_due(use, made):
                value = self._value(use)
                if value is not None:
                    self._step(use.scheduler, value)

    def watch(self, metrics: Mapping[str, Any]) -> None:
        """Do nothing: which names are logged shows in the steps."""

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """Take note of an evaluation."""
        self._evaluated.update(metrics)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: `states` is saved."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing: `states` is put back."""

    def _value(self, use: SchedulerUse) -> Any:
        known = self._metrics()
        assert use.monitor is not None
        value = known.get(use.monitor)
        if value is not None:
            return value
        name = type(use.scheduler).__name__
        problem = (
            f'{self._place}: {name} has monitor="{use.monitor}", and nothing of this name was '
            f"logged so far{did_you_mean(use.monitor, known)} (logged: "
            f"{', '.join(sorted(known)) or 'nothing'})"
        )
        if use.strict:
            raise TrainingError(
                f'{problem}. Log it by self.log("{use.monitor}", ...), evaluate before the '
                "scheduler is stepped, or say strict=False",
                everywhere=True,
            )
        if problem not in self._warned:
            self._warned.add(problem)
            logger.warning("%s: it is not stepped", problem)
        return None


def is_due(use: SchedulerUse, made: Boundary) -> bool:
    """Tell whether a scheduler is stepped after a step of the run."""
    if use.interval == "step":
        return (made.batch + 1) % use.frequency == 0
    # Lightning has counted the epoch as done by the time that it looks at the plateau.
    count = made.epoch + 1 + use.reduce_on_plateau
    return made.ends_epoch and count % use.frequency == 0


def step_as_torch(scheduler: Any, metric: Any) -> None:
    """Step a scheduler, with the value of its metric if it has one."""
    if metric is None:
        scheduler.step()
    else:
        scheduler.step(metric)


def _kept(rate: Any) -> Any:
    """Return a learning rate as it is now: tensors are changed in place."""
    return rate.detach().clone() if isinstance(rate, Tensor) else rate
