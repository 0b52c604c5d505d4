"""Learning rates as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from hpctrain.errors import TrainingError

Factor = Callable[..., float]
"""(step, total_steps, **arguments) to a factor of `optimizer.lr`.

Both count from the end of the warm-up: step is 0 to total_steps - 1. A schedule of your own has
this signature too; `scheduler.use` takes its import path.
"""


def constant(step: int, total_steps: int) -> float:
    """Return 1."""
    return 1.0


def linear(step: int, total_steps: int, final: float = 0.0) -> float:
    """Fall in a straight line from 1 to `final`."""
    return 1 + (final - 1) * _progress(step, total_steps)


def cosine(step: int, total_steps: int, final: float = 0.0) -> float:
    """Fall along half a cosine from 1 to `final`.

    Source: Loshchilov and Hutter, "SGDR" (2017), one cycle without restarts.
    """
    return final + (1 - final) * (1 + math.cos(math.pi * _progress(step, total_steps))) / 2


def learning_rate(
    step: int,
    total_steps: int,
    *,
    peak: float,
    warmup_steps: int,
    factor: Factor,
    arguments: Mapping[str, Any],
) -> float:
    """Return the learning rate of one step: a linear warm-up, then the schedule over the rest.

    Args:
        step: steps done before this one.
        total_steps: of the run.
        peak: learning rate that the schedule starts at.
        warmup_steps: so many steps rise in a straight line from near 0 to the peak.
        factor: the schedule.
        arguments: of `factor`.

    Raises:
        TrainingError: if a schedule of the user's gives no number from 0.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    value = factor(step - warmup_steps, total_steps - warmup_steps, **arguments)
    if not 0 <= value < math.inf:
        name = getattr(factor, "__qualname__", factor)
        raise TrainingError(
            f"the schedule {name} gave {value!r} at step {step - warmup_steps} of "
            f"{total_steps - warmup_steps} after the warm-up: a factor is a number from 0"
        )
    return peak * value


def _progress(step: int, total_steps: int) -> float:
    """Return how much of the schedule lies behind, 0 to 1: a run may go on after its end."""
    return min(1.0, step / max(1, total_steps))
