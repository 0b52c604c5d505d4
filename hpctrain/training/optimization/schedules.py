"""Shapes of a learning rate over time, as pure functions: nothing to save, nothing to restore.

Each takes (step, total_steps, **arguments) and returns a factor of `optimizer.lr`. Both count from
the end of the warm-up, in the unit that the config chooses: steps, epochs (with their fractions)
or samples. A function of your own has this signature too; `scheduler.use` takes its import path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from hpctrain.errors import ConfigError

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
