"""A learning rate that falls where a metric stands still: the one schedule with a state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpctrain.checkpoint.best import Mode, Preference
from hpctrain.errors import ConfigError
from hpctrain.utils.text import did_you_mean

_HIGHER = Preference("", "max")
"""Values are compared with their sign turned where lower ones are better."""


class Plateau:
    """Falls to `factor` of itself after `patience` evaluations without improvement.

    Evaluations give the same numbers on all ranks, so all of them decide the same.
    """

    def __init__(
        self,
        metric: str = "loss",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        cooldown: int = 0,
        final: float = 0.0,
    ) -> None:
        """Check the arguments.

        Args:
            metric: of the evaluation.
            factor: of the learning rate, above 0 and below 1.
            patience: evaluations without improvement before it falls.
            threshold: an improvement is at least this part of the best value so far.
            cooldown: evaluations after a fall that do not count.
            final: factor of `optimizer.lr` that it does not fall below.

        Raises:
            ConfigError: if an argument makes no sense.
        """
        if not 0 < factor < 1:
            raise ConfigError(f"scheduler.factor = {factor}: expected a number between 0 and 1")
        if min(patience, cooldown) < 0 or threshold < 0 or not 0 <= final <= 1:
            raise ConfigError(
                "scheduler: patience, cooldown and threshold are numbers from 0, final is 0 to 1"
            )
        self.metric = metric
        self._fall = factor
        self._patience = patience
        self._threshold = threshold
        self._cooldown = cooldown
        self._final = final
        self._mode: Mode = "max"
        self._factor = 1.0
        self._best: float | None = None
        self._without = 0
        self._resting = 0

    def watch(self, metrics: Mapping[str, Mode]) -> None:
        """Learn what an evaluation gives, and which direction of it is better.

        Raises:
            ConfigError: if there are no evaluations, or none of this metric.
        """
        if not metrics:
            raise ConfigError('scheduler.use = "plateau": needs evaluations: set data.validation')
        if self.metric not in metrics:
            raise ConfigError(
                f'scheduler.metric = "{self.metric}": the task has no such metric'
                f"{did_you_mean(self.metric, metrics)} (metrics: {', '.join(sorted(metrics))})"
            )
        self._mode = metrics[self.metric]

    def __call__(self, step: float, total_steps: float) -> float:
        """Return the factor of `optimizer.lr`."""
        return self._factor

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Take note of an evaluation. A value that is not a number is no improvement."""
        value = metrics[self.metric] if self._mode == "max" else -metrics[self.metric]
        best = self._best
        if best is not None:
            best += self._threshold * abs(best)
        if _HIGHER.is_better(value, best):
            self._best, self._without = value, 0
        else:
            self._without += 1
        if self._resting:
            self._resting -= 1
            self._without = 0
        if self._without > self._patience:
            self._factor = max(self._final, self._factor * self._fall)
            self._resting, self._without = self._cooldown, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON."""
        return {
            "metric": self.metric,
            "mode": self._mode,
            "factor": self._factor,
            "best": self._best,
            "without": self._without,
            "resting": self._resting,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; one of another schedule, metric or direction says nothing."""
        if (state.get("metric"), state.get("mode", self._mode)) != (self.metric, self._mode):
            return
        self._factor, self._best = state["factor"], state["best"]
        self._without, self._resting = state["without"], state["resting"]
