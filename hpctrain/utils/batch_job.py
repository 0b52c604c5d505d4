"""The batch job that this process belongs to, as its environment says. Standard library only.

Read here for all: for the time left, the lease on a run folder, and what exit.json says of a job.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import inf

_VARIABLES = (
    # Scheduler, the job's id, how often it was started again, and the cluster of the id.
    ("slurm", "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_CLUSTER_NAME"),
    ("lsf", "LSB_JOBID", "", ""),
    ("pbs", "PBS_JOBID", "", ""),
    # Of a script of `flux batch` and all that it runs; of a plain `flux run`.
    ("flux", "FLUX_ENCLOSING_ID", "", ""),
    ("flux", "FLUX_JOB_ID", "", ""),
)
"""Set in a job's script and in all its ranks. LSF and PBS give a job that they start again another
id; PBS names its server in the id, LSF its cluster nowhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchJob:
    """A job of a batch system, and which start of it this is.

    Attributes:
        scheduler: "slurm", "lsf", "pbs" or "flux".
        id: of the job; under LSF that of the whole array.
        element: index in the array where the id is that of the whole: of LSF, and of the one
            element of Slurm's that has the array's own id. Empty elsewhere.
        restart: how often the scheduler itself has started the job again.
        cluster: that the id is of; empty if that is not known.
    """

    scheduler: str
    id: str
    element: str = ""
    restart: int = 0
    cluster: str = ""

    @property
    def name(self) -> str:
        """Id by which the scheduler's commands know it; of an array's element `8[3]` or `8_3`."""
        if not self.element:
            return self.id
        return (
            f"{self.id}_{self.element}"
            if self.scheduler == "slurm"
            else f"{self.id}[{self.element}]"
        )


def ascii_id(job: str) -> str:
    """Return a job's id in ASCII: Flux begins its own with an f that may have a hook.

    It takes both, and prints the one or the other by the locale of the moment.
    """
    return job.replace("\u0192", "f")


def batch_job(environ: Mapping[str, str]) -> BatchJob | None:
    """Return the job that a process with this environment is of, None outside of any."""
    for scheduler, id_variable, restart_variable, cluster_variable in _VARIABLES:
        if job := environ.get(id_variable):
            restart = environ.get(restart_variable, "")
            index = environ.get("LSB_JOBINDEX", "") if scheduler == "lsf" else ""
            if scheduler == "slurm" and environ.get("SLURM_ARRAY_JOB_ID") == job:
                index = environ.get("SLURM_ARRAY_TASK_ID", "")
            return BatchJob(
                scheduler=scheduler,
                id=ascii_id(job),
                element="" if scheduler == "lsf" and index == "0" else index,
                restart=int(restart) if restart.isdecimal() else 0,
                cluster=environ.get(cluster_variable, "") or job.partition(".")[2],
            )
    return None


def job_identity(environ: Mapping[str, str]) -> str | None:
    """Return what names this job and this start of it, such as "slurm 4711.1"."""
    job = batch_job(environ)
    return None if job is None else f"{job.scheduler} {job.name}.{job.restart}"


def lineage(environ: Mapping[str, str]) -> tuple[str | None, int]:
    """Return what names the chain of jobs that this one belongs to, and its number in it, from 1.

    Job scripts say so; None and 1 where there is none of ours.
    """
    attempt = environ.get("HPCTRAIN_ATTEMPT", "")
    number = int(attempt) if attempt.isdecimal() else 1
    return environ.get("HPCTRAIN_TOKEN") or None, max(1, number)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a job script says of its bounds; 0: nothing.

    Attributes:
        max_jobs: of the run.
        node_hours: that this job may take.
        max_node_hours: of all jobs of the run together.
    """

    max_jobs: int = 0
    node_hours: float = 0.0
    max_node_hours: float = 0.0


def budget(environ: Mapping[str, str]) -> Budget:
    """Return the bounds that the script of this job has set; none for what makes no sense."""
    jobs = environ.get("HPCTRAIN_MAX_JOBS", "")
    hours = {}
    for key in ("node_hours", "max_node_hours"):
        with suppress(ValueError):
            number = float(environ.get(f"HPCTRAIN_{key.upper()}", "0"))
            hours[key] = number if 0 <= number < inf else 0.0
    return Budget(max_jobs=int(jobs) if jobs.isdecimal() and len(jobs) < 10 else 0, **hours)
