"""Judges the time that the job has left."""

from __future__ import annotations

import math

from hpctrain.preflight.finding import Finding
from hpctrain.utils.text import duration

_LITTLE_SECONDS = 300.0

WALLTIME_FIX = "export HPCTRAIN_DEADLINE=$(($(date +%s) + SECONDS_LEFT)) in the job script"


def judge_walltime(
    seconds_left: float, problem: str | None, needed_seconds: float | None
) -> Finding:
    """Hold the time left against the length of the run.

    Args:
        seconds_left: infinite where no end is known.
        problem: why the scheduler of this job does not say; None where it does, or there is none.
        needed_seconds: of all steps of the run, as far as one step tells; None: it is unknown.
    """
    name = "walltime"
    run = "" if needed_seconds is None else f"; all steps take about {duration(needed_seconds)}"
    if math.isinf(seconds_left):
        if problem is None:
            return Finding(name=name, status="pass", fact=f"no limit is known{run}")
        return Finding(name=name, status="warn", fact=f"{problem}{run}", fix=WALLTIME_FIX)
    fact = f"{duration(seconds_left)} left{run}"
    values = {"seconds": seconds_left}
    if seconds_left < _LITTLE_SECONDS:
        return Finding(
            name=name,
            status="fail" if seconds_left <= 0 else "warn",
            fact=fact,
            fix="ask the scheduler for more time; see that HPCTRAIN_DEADLINE, where it is set, and "
            "run.max_seconds are right",
            values=values,
        )
    if needed_seconds is not None and needed_seconds > seconds_left:
        fact += ": the run will stop, save, and has to be submitted again"
    return Finding(name=name, status="pass", fact=fact, values=values)
