"""How long the job may still run. Asks the environment only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_JOBS = ("SLURM_JOB_ID", "LSB_JOBID", "PBS_JOBID", "FLUX_JOB_ID")


@dataclass(frozen=True, slots=True)
class TimeLeft:
    """Seconds until the scheduler ends the job, and who says so."""

    seconds: float
    source: str


def time_left(environ: Mapping[str, str], now: float) -> TimeLeft | None:
    """Return the time left; None where nobody tells.

    Args:
        environ: of rank 0.
        now: seconds since the epoch.

    Raises:
        ValueError: if a variable is no time.
    """
    for variable in ("HPCTRAIN_DEADLINE", "SLURM_JOB_END_TIME"):
        if text := environ.get(variable):
            try:
                return TimeLeft(float(text) - now, variable)
            except ValueError:
                raise ValueError(f"{variable}={text!r} is no time in seconds since 1970") from None
    return None


def batch_job(environ: Mapping[str, str]) -> str | None:
    """Return the variable that names the batch job; None outside of one."""
    return next((key for key in _JOBS if key in environ), None)
