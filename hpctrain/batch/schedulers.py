"""What Slurm, LSF and PBS tell a job about itself: a table, one row a scheduler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hpctrain.batch.time_left import Answer, from_bjobs, from_qstat, from_squeue

Environment = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduler:
    """How one batch system names a job, and how it is asked for the time that is left.

    Attributes:
        job: variable with the job's id, set in its script and in all its ranks.
        restart: variable that counts how often the scheduler itself has started the job again;
            empty where it gives the job another id instead.
        end: variable with the job's end in Unix time, where there is one.
        question: the command, as a function of the environment.
        answer: reads what that command prints.
    """

    name: str
    job: str
    restart: str = ""
    end: str = ""
    question: Callable[[Environment], tuple[str, ...]]
    answer: Callable[[str, float], Answer]


def _bjobs(environ: Environment) -> tuple[str, ...]:
    job, index = environ["LSB_JOBID"], environ.get("LSB_JOBINDEX", "0")
    element = f"{job}[{index}]" if index not in ("", "0") else job
    return ("bjobs", "-noheader", "-o", "time_left", element)


SCHEDULERS = (
    Scheduler(
        name="slurm",
        job="SLURM_JOB_ID",
        restart="SLURM_RESTART_COUNT",
        end="SLURM_JOB_END_TIME",
        question=lambda environ: ("squeue", "-h", "-j", environ["SLURM_JOB_ID"], "-o", "%L"),
        answer=from_squeue,
    ),
    Scheduler(name="lsf", job="LSB_JOBID", question=_bjobs, answer=from_bjobs),
    Scheduler(
        name="pbs",
        job="PBS_JOBID",
        question=lambda environ: ("qstat", "-f", "-F", "json", environ["PBS_JOBID"]),
        answer=from_qstat,
    ),
)


def scheduler_of(environ: Environment) -> Scheduler | None:
    """Return the batch system that this process is a job of, None outside of any."""
    return next((item for item in SCHEDULERS if environ.get(item.job)), None)


def lineage(environ: Environment) -> tuple[str | None, int]:
    """Return what names the chain of jobs that this one belongs to, and its number in it, from 1.

    Job scripts say so; None and 1 where there is none of ours.
    """
    attempt = environ.get("HPCTRAIN_ATTEMPT", "")
    return environ.get("HPCTRAIN_TOKEN") or None, int(attempt) if attempt.isdecimal() else 1


def job_identity(environ: Environment) -> str | None:
    """Return what names this job and this start of it, such as "slurm 4711.1"."""
    scheduler = scheduler_of(environ)
    if scheduler is None:
        return None
    restart = environ.get(scheduler.restart, "0") if scheduler.restart else "0"
    index = environ.get("LSB_JOBINDEX", "0") if scheduler.name == "lsf" else "0"
    element = f"[{index}]" if index not in ("", "0") else ""
    return f"{scheduler.name} {environ[scheduler.job]}{element}.{restart or '0'}"
