"""LR schedules, shapes of a learning rate: pure functions, but for `Plateau`, which has a state.

Each takes (step, total_steps, **arguments) and returns a factor of `optimizer.lr`. Both count from
the end of the warm-up, in the unit that the config chooses: steps, epochs (with their fractions)
or samples. A function of your own has this signature too; `scheduler.use` takes its import path.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpctrain.checkpoint.best import Mode, Preference
from hpctrain.config.registry import bind, resolve, unknown_name
from hpctrain.config.schema import ComponentSection
from hpctrain.errors import ConfigError
from hpctrain.utils.text import did_you_mean

Factor = Callable[..., float]
"""(step, total_steps, **arguments) to a factor of `optimizer.lr`."""


def constant(step: float, total_steps: float) -> float:
    """Return 1."""
    return 1.0


def linear(step: float, total_steps: float, final: float = 0.0) -> float:
    """Fall in a straight line from 1 to `final`."""
    return 1 + (final - 1) * _progress(step, total_steps)


def cosine(step: float, total_steps: float, final: float = 0.0) -> float:
    """Fall along half a cosine from 1 to `final`.

    Source: Loshchilov and Hutter, "SGDR" (2017), one cycle without restarts.
    """
    return _along_cosine(1.0, final, _progress(step, total_steps))


def step_decay(step: float, total_steps: float, every: float, factor: float = 0.1) -> float:
    """Fall to `factor` of itself after each `every`."""
    if every <= 0:
        raise ConfigError(f"scheduler.every = {every}: expected a number above 0")
    return float(factor ** math.floor(step / every))


def multistep(
    step: float, total_steps: float, milestones: Sequence[float], factor: float = 0.1
) -> float:
    """Fall to `factor` of itself at each of `milestones`."""
    return float(factor ** sum(step >= milestone for milestone in milestones))


def one_cycle(
    step: float,
    total_steps: float,
    rise: float = 0.3,
    initial: float = 0.04,
    final: float = 4e-6,
) -> float:
    """Rise along half a cosine from `initial` to 1, then fall along another to `final`.

    It has its warm-up in itself: `rise` is the part of the run that it takes.

    Source: Smith and Topin, "Super-Convergence" (2018); the numbers are torch's OneCycleLR's.
    """
    progress = _progress(step, total_steps)
    if progress < rise:
        return _along_cosine(initial, 1.0, progress / rise)
    return _along_cosine(1.0, final, (progress - rise) / (1 - rise) if rise < 1 else 1.0)


def inverse_square_root(step: float, total_steps: float, timescale: float) -> float:
    """Fall as 1 over the square root of the time, half of the peak after 3 `timescale`.

    With the length of the warm-up as `timescale` it is the schedule of the first transformer.

    Source: Vaswani et al., "Attention Is All You Need" (2017), equation 3.
    """
    if timescale <= 0:
        raise ConfigError(f"scheduler.timescale = {timescale}: expected a number above 0")
    return math.sqrt(timescale / (timescale + step))


def _along_cosine(begin: float, end: float, progress: float) -> float:
    return end + (begin - end) * (1 + math.cos(math.pi * progress)) / 2


def _progress(step: float, total_steps: float) -> float:
    """Return how much of the schedule lies behind, 0 to 1: a run may go on after its end."""
    return min(1.0, step / total_steps) if total_steps > 0 else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    factor: Factor
    arguments: Mapping[str, Any]
    until: float | None


class Chained:
    """Schedules in turn, each from where the one before has ended.

    Every part counts from its own beginning to its own end, and its factors are of what the parts
    before have left: "constant", then "cosine" with final = 0.5, then "linear" ends at 0.
    """

    def __init__(self, parts: Sequence[Mapping[str, Any]]) -> None:
        """Find the parts.

        Args:
            parts: tables `[[scheduler.parts]]` with `use`, the arguments of that schedule, and
                `until`: where the part ends, counted from the end of the warm-up in the unit of
                the schedule. The last one ends with the run and has no `until`.

        Raises:
            ConfigError: if a part cannot be found, refuses its arguments, or has no right end.
        """
        if not isinstance(parts, list) or not parts:
            raise ConfigError("scheduler.parts: expected tables [[scheduler.parts]], at least one")
        self._parts = [
            _part(number, part, last=number == len(parts))
            for number, part in enumerate(parts, start=1)
        ]
        ends = [part.until for part in self._parts if part.until is not None]
        if any(after <= before for before, after in zip([0.0, *ends], ends, strict=False)):
            raise ConfigError(f"scheduler.parts: until = {ends}: expected rising numbers above 0")

    def __call__(self, step: float, total_steps: float) -> float:
        """Return the factor of `optimizer.lr`."""
        value, begin = 1.0, 0.0
        for part in self._parts:
            end = total_steps if part.until is None else part.until
            inside = part.until is None or step < end
            done = step - begin if inside else end - begin
            value *= part.factor(done, max(0.0, end - begin), **part.arguments)
            if inside:
                break
            begin = end
        return value


def _part(number: int, part: Mapping[str, Any], *, last: bool) -> _Part:
    where = f"[[scheduler.parts]], the {number}. of them"
    if not isinstance(part, Mapping) or not isinstance(part.get("use"), str):
        raise ConfigError(f'{where}: `use` is missing, such as use = "cosine"')
    arguments = {key: value for key, value in part.items() if key not in ("use", "until")}
    use, until = part["use"], part.get("until")
    if last != (until is None):
        wrong = "the last one ends with the run, without `until`" if last else "`until` is missing"
        raise ConfigError(f"{where}: {wrong}")
    if until is not None and (isinstance(until, bool) or not isinstance(until, int | float)):
        raise ConfigError(f"{where}: until = {until!r}: expected a number")
    if (problem := unknown_name("scheduler", use)) is not None:
        raise ConfigError(f'{where}: use = "{use}": {problem}')
    component = ComponentSection(use=use, arguments=arguments)
    factor = resolve("scheduler", component)
    if inspect.isclass(factor):
        raise ConfigError(f'{where}: use = "{use}" has a state of its own and stands alone only')
    mistakes = bind("scheduler", component, factor, given=("step", "total_steps"))
    if mistakes:
        raise ConfigError(f"{where}: {'; '.join(map(str, mistakes))}")
    return _Part(factor=factor, arguments=arguments, until=until)


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
