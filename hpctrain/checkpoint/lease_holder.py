"""Who holds a lease: what a job writes about itself, and whether it still lives."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Predicate

from hpctrain.utils import proc
from hpctrain.utils.text import printable

# By scheduler: the job's id, how often it was started again, and what names the cluster.
_JOB_VARIABLES = (
    ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_CLUSTER_NAME"),
    ("LSB_JOBID", "", ""),
    ("PBS_JOBID", "", ""),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds a lease, as its file says.

    Attributes:
        job: id of the scheduler's job, None outside of any.
        restart: how often the scheduler has started it again.
        cluster: that the id is of; empty if that is not known.
        started: when the process began, see `proc.start_time`.
        boot: of the machine.
        namespace: in which the process id holds; empty if it is not known.
        clock: namespace of the clock that `started` is by.
        token: of the job script's chain, and `attempt` the job's number in it.
        nonce: of this lease alone.
        since: for people.
    """

    job: str | None = None
    restart: Annotated[int, Ge(0)] = 0
    cluster: str = ""
    host: str = ""
    pid: Annotated[int, Ge(0)] = 0
    started: str | None = None
    boot: str = ""
    namespace: str = ""
    clock: str = ""
    token: str | None = None
    attempt: Annotated[int, Ge(1)] = 1
    nonce: Annotated[str, Predicate(str.isalnum)]
    since: str = ""

    def __str__(self) -> str:
        job = f"job {self.job}, " if self.job else ""
        text = f"{job}process {self.pid} on {self.host} since {self.since}"
        return printable(text) if self.pid else "unknown"


def this_holder(environ: Mapping[str, str]) -> Holder:
    """Return who this process is, with a nonce of its own each time."""
    job, restart, cluster = None, "0", ""
    for job_variable, restart_variable, cluster_variable in _JOB_VARIABLES:
        if job_variable in environ:
            job, restart = environ[job_variable], environ.get(restart_variable, "0")
            # PBS names its server in the id.
            cluster = environ.get(cluster_variable, "") or job.partition(".")[2]
            break
    attempt = environ.get("HPCTRAIN_ATTEMPT", "")
    return Holder(
        token=environ.get("HPCTRAIN_TOKEN") or None,
        attempt=max(1, int(attempt)) if attempt.isdecimal() else 1,
        job=job,
        restart=int(restart) if restart.isdecimal() else 0,
        cluster=cluster,
        host=socket.gethostname(),
        pid=os.getpid(),
        started=proc.start_time(os.getpid()) if proc.shows_own_processes() else None,
        boot=proc.boot_id(),
        namespace=proc.pid_namespace(),
        clock=proc.time_namespace(),
        nonce=secrets.token_hex(8),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
    )


def lives_here(holder: Holder) -> bool | None:
    """Tell whether a holder's process lives; None if that cannot be told from here.

    So it is on another host, and in another PID namespace, where the same ids are of others.
    """
    namespace = proc.pid_namespace()
    here = (socket.gethostname(), proc.boot_id(), namespace)
    if not namespace or (holder.host, holder.boot, holder.namespace) != here:
        return None
    is_same_clock = holder.clock in ("", proc.time_namespace())
    return proc.lives(holder.pid, holder.started if is_same_clock else None)
