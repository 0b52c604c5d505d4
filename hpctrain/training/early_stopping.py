"""Early stopping: which metrics are watched, in which direction, and when they end a run."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hpctrain.checkpoint.best import Mode, Preference
from hpctrain.config import Config
from hpctrain.config.schema import (
    EarlyStoppingSection,
    TrainingSection,
)
from hpctrain.errors import ConfigError, TrainingError
from hpctrain.topology import Communicator, on_rank_zero
from hpctrain.training.components import Prune
from hpctrain.training.position import Position
from hpctrain.training.task.task import Task
from hpctrain.utils.text import did_you_mean, metric, plural

logger = logging.getLogger("hpctrain")

STATE = "early_stopping"
"""Name of the state among the values of a checkpoint."""
ASKED = "trainer.should_stop was set"
"""The reason where code of the user's has ended a run."""
PRUNED = "pruned"
"""The reason where a study has ended a run that does not look promising."""


class EarlyStopping:
    """Says whether a run ends here, the same on all ranks: it sees what all of them have.

    Without a metric to monitor nothing ends the run but what asks for it.

    Attributes:
        reason: why the run is to end; None: it is not.
    """

    def __init__(
        self, section: EarlyStoppingSection, training: TrainingSection, mode: Mode = "min"
    ) -> None:
        """Prepare.

        Args:
            section: of the config.
            training: has the least length of the run, whatever the metric says.
            mode: which direction of the metric is better.
        """
        self.reason: str | None = None
        self._section = section
        self._min_epochs, self._min_steps = training.min_epochs or 0, training.min_steps or 0
        self._mode = mode
        self._best: float | None = None
        self._waited = 0

    def ask(self, reason: str) -> None:
        """End the run where it may end at the soonest. To be called on all ranks alike."""
        if self.reason is None:
            self.reason = reason

    def ends(self, place: Position) -> bool:
        """Tell whether the run ends at `place`. Asked at every step."""
        if self.reason is None:
            return False
        return place.epoch >= self._min_epochs and place.step >= self._min_steps

    def observe(self, metrics: Mapping[str, float], place: Position) -> None:
        """Take note of an evaluation.

        Raises:
            TrainingError: if it has not the metric to monitor.
        """
        name = self._section.monitor
        if name is None:
            return
        if name not in metrics:
            raise TrainingError(
                f'early_stopping.monitor = "{name}": the evaluation gave no such metric'
                f"{did_you_mean(name, metrics)} (metrics: {', '.join(sorted(metrics))})",
                everywhere=True,
            )
        reason = self._judge(metrics[name])
        if reason is None or self.reason is not None:
            return
        self.ask(f"early stopping: {name} {reason}")
        if not self.ends(place):
            logger.info(
                "step %s: %s; the run goes on, by training.min_epochs or min_steps",
                f"{place.step:,}",
                self.reason,
            )

    def ask_study(
        self,
        prune: Prune,
        place: Position,
        metrics: Mapping[str, float],
        communicator: Communicator,
    ) -> None:
        """End the run here if a study says so, which rank 0 asks for all. Collective: all ranks.

        Raises:
            TrainingError: on every rank, if the question fails.
        """
        if self.reason is not None:
            return

        def is_pruned() -> bool:
            try:
                return bool(prune(place.step, dict(metrics)))
            except Exception as error:
                raise TrainingError(
                    f"prune(step={place.step}, metrics) has failed: {type(error).__name__}: "
                    f"{error}; to prune a run it returns True"
                ) from error

        if on_rank_zero(communicator, is_pruned):
            self.ask(PRUNED)

    def _judge(self, value: float) -> str | None:
        """Return why to end by a value of the metric, None if not.

        Source: EarlyStopping._evaluate_stopping_criteria of Lightning 2.6, for the order.
        """
        section = self._section
        better = Preference(section.monitor or "", self._mode).is_better
        if section.check_finite and not math.isfinite(value):
            return f"is {value}, which is not finite"
        enough, too_bad = section.stopping_threshold, section.divergence_threshold
        if enough is not None and better(value, enough):
            return f"has come to {metric(value)}, beyond stopping_threshold = {enough:g}"
        if too_bad is not None and self._is_worse(value, too_bad):
            return f"has come to {metric(value)}, beyond divergence_threshold = {too_bad:g}"
        least = section.min_delta if self._mode == "max" else -section.min_delta
        if better(value - least, self._best):
            self._best, self._waited = value, 0
            return None
        self._waited += 1
        if self._waited < section.patience:
            return None
        times = plural(self._waited, "evaluation")
        best = "" if self._best is None else f", best {metric(self._best)}"
        return f"has not become better for {times}{best}"

    def _is_worse(self, value: float, than: float) -> bool:
        return value < than if self._mode == "max" else value > than

    def state_dict(self) -> dict[str, Any]:
        """Return what a run that goes on should know, as JSON."""
        return {
            "best": self._best,
            "waited": self._waited,
            "reason": self.reason,
            "settings": dataclasses.asdict(self._section),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; one of another metric says nothing, nor one of an older release."""
        settings = state.get("settings")
        if settings is None or settings.get("monitor") != self._section.monitor:
            return
        self._best, self._waited = state["best"], state["waited"]
        if settings == dataclasses.asdict(self._section):
            self.reason = state["reason"]


def ended_early(config: Config, saved: Mapping[str, Any], at: Position) -> str | None:
    """Return why a run is complete that has come to `at`, None if it is not, or not by this.

    It goes on under other settings of `[early_stopping]`, and up to training.min_epochs and
    min_steps.

    Args:
        config: of this job.
        saved: values of the checkpoint to go on from.
        at: where that stands.
    """
    stopping = EarlyStopping(config.early_stopping, config.training)
    stopping.load_state_dict(saved.get(STATE, {}))
    return stopping.reason if stopping.ends(at) else None


def directions(config: Config, task: Task) -> dict[str, Mode]:
    """Return which direction of each metric of the evaluation is better: the config's word wins."""
    checkpoint, stopping = config.checkpoint, config.early_stopping
    asked = (
        (stopping.monitor, stopping.mode),
        (checkpoint.keep_best, checkpoint.keep_best_mode),
    )
    said = {name: mode for name, mode in asked if mode is not None}
    declared = dict(task.metrics)
    for further in config.data.evaluations:
        declared |= {f"{further}/{name}": mode for name, mode in task.metrics.items()}
    return {name: said.get(name) or mode for name, mode in declared.items()}


def check_monitored(config: Config, task: Task) -> None:
    """Check that there are the metrics that the config watches.

    Raises:
        ConfigError: if the task is known to have no such metric.
    """
    asked = {
        "checkpoint.keep_best": config.checkpoint.keep_best,
        "early_stopping.monitor": config.early_stopping.monitor,
    }
    known: Sequence[str] = sorted(directions(config, task))
    for key, name in asked.items():
        if name is not None and name not in known:
            raise ConfigError(
                f'{key} = "{name}": {config.task.use} has no such metric'
                f"{did_you_mean(name, known)} (metrics: {', '.join(known)})"
            )


def early_stopping_of(config: Config, task: Task, saved: Mapping[str, Any]) -> EarlyStopping:
    """Return what may end the run before its limits, as far as it had come when it was saved.

    Args:
        config: of the job.
        task: names its metrics.
        saved: values of the checkpoint that the run goes on from; empty: it begins.
    """
    mode = directions(config, task).get(config.early_stopping.monitor or "", "min")
    stopping = EarlyStopping(config.early_stopping, config.training, mode)
    if STATE in saved:
        stopping.load_state_dict(saved[STATE])
    return stopping
