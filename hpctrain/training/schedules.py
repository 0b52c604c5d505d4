"""Learning rates as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Factor = Callable[..., float]
"""(step, total_steps, **arguments) to a factor of `optimizer.lr`; step is 0 to total_steps - 1."""


def constant(step: int, total_steps: int) -> float:
    """Return 1."""
    return 1.0


def linear(step: int, total_steps: int, final: float = 0.0) -> float:
    """Fall in a straight line from 1 to `final`."""
    return 1 + (final - 1) * step / max(1, total_steps)


def cosine(step: int, total_steps: int, final: float = 0.0) -> float:
    """Fall along half a cosine from 1 to `final`.

    Source: Loshchilov and Hutter, SGDR, 2017.
    """
    return final + (1 - final) * (1 + math.cos(math.pi * step / max(1, total_steps))) / 2


def learning_rate(
    step: int,
    total_steps: int,
    *,
    peak: float,
    warmup_steps: int,
    factor: Factor,
    arguments: dict[str, Any],
) -> float:
    """Return the learning rate of one step: a linear warm-up, then the schedule over the rest.

    Args:
        step: from 0.
        total_steps: of the run.
        peak: learning rate at the end of the warm-up.
        warmup_steps: so many steps rise in a straight line to the peak.
        factor: the schedule.
        arguments: of `factor`.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    return peak * factor(step - warmup_steps, total_steps - warmup_steps, **arguments)
