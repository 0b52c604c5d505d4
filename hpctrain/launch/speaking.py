"""Which rank tells what all of them know, where they cannot talk to each other.

Rank 0 does, unless it comes late: a launcher ends the job once the first rank leaves, so that
nothing would have been told. The others give it a head start, and then the one tells it that gets
the lock of this node's ranks. Of other nodes nothing is seen.
"""

from __future__ import annotations

import enum
import fcntl
import os
import time
from collections.abc import Callable, Sequence

from hpctrain.launch.arrivals import Seen, mark, process_of, ranks_of_node
from hpctrain.launch.environment import WHOLE_NUMBER, Environment, ancestors, launchers_in, nearest
from hpctrain.launch.launchers import Launcher

_LEAVES_IT = "hpctrain-leaves-it-to-another-rank"

HEAD_START_SECONDS = 2.0
# Rank 0 of another node, or those beside it, are to be first, and rank 1 before others.
_RANK_ONE_SECONDS = 5.0
_ELSEWHERE_SECONDS = 8.0
_SRUN_SECONDS = 12.0
_LINGER_SECONDS = 20.0
# A rank that leaves before MPI_Init ends no job of theirs.
_LET_OTHERS_RUN = ("srun", "mpich", "intelmpi", "mvapich2", "pmi", "flux")
_PAUSE_SECONDS = 0.25


class Voice(enum.Enum):
    """For whom this process is to tell a failure that all ranks share."""

    NOBODY = "another rank tells it"
    ALL = "no other rank tells it"
    NODE = "rank 0 is on another node, and may have told it"


def find_voice() -> Voice:
    """Return whether this process is to tell a failure that all ranks share.

    Returns once that is clear: with rank 0 at once, with the others after its head start, or when
    it has told it and gone.
    """
    launcher, rank = innermost(os.environ, ancestors()) or (None, None)
    if launcher is None or rank is None or not launcher.processes:
        return Voice.ALL if may_speak(os.environ) else Voice.NOBODY

    def look() -> dict[int, Seen]:
        return {other: seen for other, seen in ranks_of_node(launcher).items() if other != rank}

    expected = max(len(look()), _local_world_size(launcher) - 1)
    if rank != 0 and not _rank_zero_is_silent(launcher, rank, look):
        return Voice.NOBODY
    if not _has_lock(process_of(launcher)):
        return Voice.NOBODY
    # None leaves before the one that has the lock: one that was here and has left has told it.
    if rank != 0 and len(look()) < expected:
        return Voice.NOBODY
    # Most launchers end the job once rank 0 has told it and left. srun may let the others be.
    return Voice.NODE if rank != 0 and launcher.name == "srun" and 0 not in look() else Voice.ALL


def _local_world_size(launcher: Launcher) -> int:
    told = next((os.environ[key] for key in launcher.local_world_size if key in os.environ), "")
    return int(told) if WHOLE_NUMBER.fullmatch(told) else 0


def innermost(env: Environment, above: Sequence[str]) -> tuple[Launcher, int | None] | None:
    """Return which launcher above has started this process, and its rank, if they can be told.

    For what has to be said where there can be no claim.
    """
    row = nearest(launchers_in(env), above)
    if row is None:
        return None
    told = next((env[key] for key in row.rank if key in env), "")
    return row, int(told) if WHOLE_NUMBER.fullmatch(told) else None


def is_by_hand(env: Environment) -> bool:
    """Return whether each process may have been started alone, with an output of its own."""
    launchers = launchers_in(env)
    return not launchers or any(not row.mpi_families for row in launchers)


def may_speak(env: Environment) -> bool:
    """Return whether no launcher in the environment calls this process anything but rank 0.

    For what has to be said before there is a claim, or where there can be none.
    """
    ranks = [env.get(key, "") for key in ("RANK", *(row.rank[0] for row in launchers_in(env)))]
    return all(int(rank) == 0 for rank in ranks if WHOLE_NUMBER.fullmatch(rank))


def let_rank_zero_end() -> None:
    """Return when rank 0 has seen that it was spoken for, where its launcher would let it run."""
    launcher, rank = innermost(os.environ, ancestors()) or (None, None)
    if launcher is None or launcher.name not in _LET_OTHERS_RUN or not rank:
        return
    end = time.monotonic() + _LINGER_SECONDS
    while time.monotonic() < end:
        zero = ranks_of_node(launcher).get(0)
        if zero is None or _LEAVES_IT in zero.marks:
            return
        time.sleep(_PAUSE_SECONDS)


def _rank_zero_is_silent(
    launcher: Launcher, rank: int, look: Callable[[], dict[int, Seen]]
) -> bool:
    """Give rank 0 its head start, and return whether it has not told anything by then."""
    is_here = 0 in look()
    if not is_here and launcher.name == "srun" and os.environ.get("SLURM_NODEID") == "0":
        return False  # it was here, and has left
    if is_here:
        seconds = HEAD_START_SECONDS
    elif launcher.name == "srun":
        seconds = _SRUN_SECONDS
    else:
        seconds = _RANK_ONE_SECONDS if rank == 1 else _ELSEWHERE_SECONDS
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(_PAUSE_SECONDS)
        if is_here and 0 not in look():
            return False
    return True


def _has_lock(launcher: int | None) -> bool:
    """Return whether this is the first of the node's ranks to lock their launcher's process.

    The others return when it has ended: many launchers end a job with the first rank that leaves,
    and the one that has the lock may not have told it yet. The lock lasts as long as this process.
    """
    if launcher is None:
        return True
    try:
        folder = os.open(f"/proc/{launcher}", os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return True
    if _locks(folder):
        return True
    # After the try: for the mark of a late rank 0 the one that has the lock may wait, and leave.
    mark(_LEAVES_IT)
    end = time.monotonic() + _LINGER_SECONDS
    while time.monotonic() < end and not _locks(folder):
        time.sleep(_PAUSE_SECONDS)
    return False


def _locks(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
