"""Whether another job is gone, as its scheduler says."""

from __future__ import annotations

import re
from collections.abc import Mapping

from hpctrain.batch.deadline import ask
from hpctrain.batch.schedulers import scheduler_of

_LONGEST_ANSWER_SECONDS = 10.0
_STATE = re.compile(r'"job_state"\s*:\s*"(\w+)"')


def job_is_gone(job: str, cluster: str, environ: Mapping[str, str]) -> bool | None:
    """Tell whether a job has ended, with all its processes; None if the scheduler does not say.

    Args:
        job: its id, as its own environment had it.
        cluster: that the id is of; the same number means another job on another cluster.
        environ: of the job that asks.
    """
    scheduler = scheduler_of(environ)
    if scheduler is None or not re.fullmatch(r"\w[\w.\[\]-]*", job):
        return None
    question: tuple[str, ...]
    if scheduler.name == "slurm":
        here, question = environ.get("SLURM_CLUSTER_NAME"), ("squeue", "-h", "-j", job, "-o", "%T")
    elif scheduler.name == "pbs":
        here, question = environ["PBS_JOBID"].partition(".")[2], ("qstat", "-f", "-F", "json", job)
    else:
        return None  # LSF names its cluster neither in the id nor in the environment
    if not cluster or cluster != here:
        return None
    text, problem = ask(question, environ, _LONGEST_ANSWER_SECONDS)
    return (_from_squeue if scheduler.name == "slurm" else _from_qstat)(text, problem)


def _from_squeue(text: str, problem: str | None) -> bool | None:
    """Read the state of a job that squeue shows while it waits, runs or completes."""
    if problem is not None:
        return True if "Invalid job id" in problem else None
    return not text.strip()


def _from_qstat(text: str, problem: str | None) -> bool | None:
    """Read the state of a job: F and X are finished, E still is about to."""
    if problem is not None:
        return True if re.search("Unknown Job Id|has finished", problem) else None
    found = _STATE.search(text)
    return None if found is None else found[1] in ("F", "X")
