"""MPI_Init, which waits for all ranks: with a limit, with names, and ended by signals."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hpctrain.launch.arrivals import IN_MPI_INIT, marked, ranks_of_node, tell_missing
from hpctrain.launch.launchers import Claim
from hpctrain.launch.waits import ended_from_outside, limit_seconds

# By then the first rank to speak has ended the job, where anything can.
_HEAD_START_SECONDS = 5.0
# The thread that watches needs the interpreter; this does not.
_BACKSTOP_SECONDS = 60.0


def initialize(MPI: Any, claim: Claim) -> None:  # noqa: N803
    """Initialise MPI. Collective: all ranks.

    Where some rank does not come, the process ends with a message that names it.
    """
    assert claim.launcher is not None
    seconds = limit_seconds(claim.world_size)
    with (
        _backstop(seconds + _BACKSTOP_SECONDS),
        marked(IN_MPI_INIT),
        ended_from_outside(seconds, lambda asked: _last_words(claim, seconds, asked)),
    ):
        _call(MPI)


def _call(MPI: Any) -> None:  # noqa: N803
    """Call MPI_Init_thread without the interpreter's lock, which mpi4py would hold meanwhile."""
    try:
        function = ctypes.CDLL(MPI.__file__).MPI_Init_thread
    except (OSError, AttributeError):  # no symbol of that name: mpi4py knows its own way
        MPI.Init_thread(MPI.THREAD_FUNNELED)
        return
    provided = ctypes.c_int()
    # Funneled: the launch layer calls MPI from the main thread only.
    function(None, None, ctypes.c_int(MPI.THREAD_FUNNELED), ctypes.byref(provided))
    # As mpi4py has it: errors become exceptions.
    for communicator in (MPI.COMM_SELF, MPI.COMM_WORLD):
        communicator.Set_errhandler(MPI.ERRORS_RETURN)


def _last_words(claim: Claim, seconds: float, asked: str | None) -> str | None:
    """Say why this process ends, and who is missing; one rank of a node speaks.

    Args:
        claim: of this process.
        seconds: limit that has passed, if it has not been asked to end.
        asked: name of the signal that asked.
    """
    assert claim.launcher is not None
    ranks = ranks_of_node(claim.launcher)
    waiting = [rank for rank, seen in ranks.items() if seen.is_waiting]
    # Where some have left already they have said why.
    is_whole = len(ranks) >= (claim.local_world_size or 0)
    is_reporter = not ranks or (is_whole and claim.rank == min(waiting, default=None))
    if asked is not None:
        text = f"rank {claim.rank} was ended by {asked} while it waited for others in MPI_Init"
        return text if is_reporter else None
    if not is_reporter:
        time.sleep(2 * _HEAD_START_SECONDS)
    elif len(waiting) == len(ranks) > 0:
        time.sleep(_HEAD_START_SECONDS)  # another node knows more
    from hpctrain.launch.allocation import other_hosts  # only needed here

    return tell_missing(ranks, claim.world_size, seconds, other_hosts(os.environ))


@contextmanager
def _backstop(seconds: float) -> Iterator[None]:
    """End this process, with its stack, where even the thread that watches gets nowhere."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
