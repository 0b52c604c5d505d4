"""Who holds a lease, and whether it is stale: rules, apart from the files that they are about."""

from __future__ import annotations

import enum
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Predicate

from hpctrain.utils import proc
from hpctrain.utils.batch_job import batch_job, lineage
from hpctrain.utils.text import printable

RENEW_SECONDS = 30.0
STALE_SECONDS = 3 * RENEW_SECONDS
AHEAD_SECONDS = 5.0
"""A heartbeat further in the future than this is by a clock that goes otherwise."""

_FOR_PEOPLE = "%Y-%m-%d %H:%M:%S"
_TOGETHER_SECONDS = 60.0
"""Longer than processes that one loop starts take to come to a lease, from a slow disk too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds a lease, as its file says.

    Attributes:
        job: id of the scheduler's job, None outside of any.
        restart: number of times that the scheduler has started it again.
        cluster: home of the job's id; empty if it is not known.
        started: time at which the process began, see `proc.start_time`.
        boot: id of the machine's present boot.
        namespace: PID namespace that the process id is of; empty if it is not known.
        clock: time namespace that `started` is by.
        token: name of the job script's chain; `attempt` is the job's number in it.
        nonce: name of this one lease.
        since: local time at which it was taken, for people.
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


class Verdict(enum.Enum):
    """What a job may do about a lease that another one has."""

    HOLDS = "holds"
    STALE = "stale"
    WATCH = "watch"
    """Not decided by one look: stale if its heartbeat stands still for long enough."""


def judge(
    holder: Holder,
    own: Holder,
    *,
    age: float,
    lives: bool | None,
    job_is_gone: Callable[[], bool | None],
) -> Verdict:
    """Return whether a lease holds or is stale.

    Args:
        holder: job that has it.
        own: job that wants it.
        age: seconds since the last heartbeat, by the clock of the file system; negative: it is in
            the future.
        lives: whether the holder's process lives; None: that cannot be determined from here.
        job_is_gone: question to the scheduler about the holder's job; None: it does not say.
    """
    if age > STALE_SECONDS:
        return Verdict.STALE
    if lives is not None:
        return Verdict.HOLDS if lives else Verdict.STALE
    is_same_job = holder.job is not None and holder.job == own.job
    if is_same_job and holder.restart < own.restart:
        return Verdict.STALE  # the scheduler starts a job again once its processes are gone
    gone = None if is_same_job else job_is_gone()
    if gone:
        return Verdict.STALE
    if holder.token is not None and holder.token == own.token and holder.attempt < own.attempt:
        # The script has seen the earlier step end, or the scheduler the earlier job of a chain;
        # where it still shows that job, somebody may have undone the order of the two.
        return Verdict.STALE if gone is None else Verdict.WATCH
    return Verdict.WATCH if age < -AHEAD_SECONDS else Verdict.HOLDS


def this_holder(environ: Mapping[str, str]) -> Holder:
    """Return who this process is, with a nonce of its own each time."""
    job = batch_job(environ)
    token, attempt = lineage(environ)
    return Holder(
        token=token,
        attempt=attempt,
        job=None if job is None else job.name,
        restart=0 if job is None else job.restart,
        cluster="" if job is None else job.cluster,
        host=socket.gethostname(),
        pid=os.getpid(),
        started=proc.start_time(os.getpid()) if proc.shows_own_processes() else None,
        boot=proc.boot_id(),
        namespace=proc.pid_namespace(),
        clock=proc.time_namespace(),
        nonce=secrets.token_hex(8),
        since=time.strftime(_FOR_PEOPLE),
    )


def began_together(holder: Holder, own: Holder) -> bool:
    """Tell whether two were meant as processes of one run, and started one by one.

    So it is in one job, and outside of any, as by a loop over ssh, where they began together by the
    clocks of people.
    """
    if holder.job is not None or own.job is not None:
        return holder.job == own.job and holder.restart == own.restart
    try:
        then, now = (time.mktime(time.strptime(it.since, _FOR_PEOPLE)) for it in (holder, own))
    except (ValueError, OverflowError):
        return False
    return abs(now - then) < _TOGETHER_SECONDS


def lives_here(holder: Holder) -> bool | None:
    """Tell whether a holder's process lives; None if that cannot be determined from here.

    So it is on another host, and in another PID namespace, where the same ids are of others.
    """
    namespace = proc.pid_namespace()
    here = (socket.gethostname(), proc.boot_id(), namespace)
    if not namespace or (holder.host, holder.boot, holder.namespace) != here:
        return None
    is_same_clock = holder.clock in ("", proc.time_namespace())
    return proc.lives(holder.pid, holder.started if is_same_clock else None)
