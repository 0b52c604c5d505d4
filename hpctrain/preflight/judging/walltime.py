"""Judges the time that the job has left."""

from __future__ import annotations

from hpctrain.observe.text import duration
from hpctrain.preflight.finding import Finding
from hpctrain.preflight.probes.deadline import TimeLeft

_LITTLE_SECONDS = 300.0

WALLTIME_FIX = "export HPCTRAIN_DEADLINE=$(($(date +%s) + SECONDS_LEFT)) in the job script"


def judge_walltime(left: TimeLeft | None, job: str | None, needed_seconds: float | None) -> Finding:
    """Hold the time left against the length of the run.

    Args:
        left: None where nobody tells.
        job: the variable that names the batch job; None outside of one.
        needed_seconds: of all steps of the run, as far as one step tells; None: it is unknown.
    """
    name = "walltime"
    run = "" if needed_seconds is None else f"; all steps take about {duration(needed_seconds)}"
    if left is None:
        if job is None:
            return Finding(name=name, status="pass", fact=f"no limit known, no batch job{run}")
        return Finding(
            name=name,
            status="warn",
            fact=f"unknown, though {job} is set{run}",
            fix=WALLTIME_FIX,
        )
    fact = f"{duration(left.seconds)} left ({left.source}){run}"
    values = {"seconds": left.seconds}
    if left.seconds < _LITTLE_SECONDS:
        return Finding(
            name=name,
            status="fail" if left.seconds <= 0 else "warn",
            fact=fact,
            fix="ask the scheduler for more time; HPCTRAIN_DEADLINE, where set, is seconds since "
            "1970",
            values=values,
        )
    if needed_seconds is not None and needed_seconds > left.seconds:
        fact += ": the run will stop, save, and has to be submitted again"
    return Finding(name=name, status="pass", fact=fact, values=values)
