"""Whether a lease is stale: rules, apart from the files that they are about."""

from __future__ import annotations

import enum
from collections.abc import Callable

from hpctrain.checkpoint.lease_holder import Holder

RENEW_SECONDS = 30.0
STALE_SECONDS = 3 * RENEW_SECONDS
AHEAD_SECONDS = 5.0
"""A heartbeat further in the future than this is by a clock that goes otherwise."""


class Verdict(enum.Enum):
    """What a job may do about a lease that another one has."""

    HOLDS = "holds"
    STALE = "stale"
    WATCH = "watch"
    """It cannot be told by looking once: stale if its heartbeat stands still for long enough."""


def judge(
    holder: Holder,
    own: Holder,
    *,
    age: float,
    lives: bool | None,
    job_is_gone: Callable[[], bool | None],
) -> Verdict:
    """Return what is to be thought of a lease.

    Args:
        holder: has it.
        own: would like to.
        age: seconds since the last heartbeat, by the clock of the file system; negative: it is in
            the future.
        lives: whether the holder's process does; None: that cannot be told from here.
        job_is_gone: asks the scheduler whether the holder's job is; None: it does not say.
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
