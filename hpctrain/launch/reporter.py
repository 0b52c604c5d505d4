"""Which rank reports a failure that all of them share, where they cannot talk to each other.

Rank 0 does, unless it comes late: a launcher ends the job once the first rank leaves, so that
nothing would have been reported. The others give it a head start, and then the one reports it that
gets the lock of this node's ranks. Of other nodes nothing is seen.

Nothing can be sent before MPI runs, but the ranks of this node are seen from outside. The process
tree shows which processes a launcher has started here, their environment which ranks they are, and
a file in memory that they hold open, a mark, what they are at, such as that they wait in MPI_Init.
"""

from __future__ import annotations

import enum
import fcntl
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from hpctrain.errors import HpctrainError
from hpctrain.launch.environment import (
    WHOLE_NUMBER,
    Environment,
    ancestors,
    launchers_in,
    names_of,
    nearest,
)
from hpctrain.launch.launchers import Launcher
from hpctrain.utils.proc import PROC, parent_of
from hpctrain.utils.proc import ancestors as processes_above
from hpctrain.utils.text import listed, printable_lines, ranges

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

IN_MPI_INIT = "hpctrain-in-mpi-init"

_MARKS = "hpctrain-"
_SHOWN = 8


def report(error: HpctrainError) -> None:
    """Print a failure, where stderr takes it."""
    with suppress(OSError):
        sys.stderr.write(f"hpctrain: error: {printable_lines(str(error))}\n")
        sys.stderr.flush()


def report_again(error: HpctrainError) -> None:
    """Print what rank 0 of another node may have reported already, and may not have."""
    with suppress(OSError):
        sys.stderr.write(
            f"hpctrain: {socket.gethostname()} cannot start this job either: {error}\n"
        )
        sys.stderr.flush()


def refer_to_rank_zero() -> None:
    """Print where the reason is reported, for who reads the output of this process alone."""
    here = " ".join(
        f"{key}={os.environ.get(key, '(not set)')}"
        for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    )
    sys.stderr.write(
        "hpctrain: this process cannot start either: rank 0 reports why. If it does not, what "
        f"is wrong is here: {here}\n"
    )
    sys.stderr.flush()


@contextmanager
def reporting(is_rank_zero: bool) -> Iterator[None]:
    """Have rank 0 report a failure that all ranks share, before any of them leaves."""
    try:
        yield
    except HpctrainError as error:
        if error.everywhere:
            if is_rank_zero and not error.reported:
                report(error)
            error.reported = True
        raise


def report_once(error: HpctrainError) -> None:
    """Report a failure: one that only this rank knows itself, one of all ranks by one of them."""
    if not error.everywhere:
        report(error)
        return
    audience = find_audience()
    if audience is Audience.ALL:
        report(error)
        let_rank_zero_end()
    elif audience is Audience.NODE:
        report_again(error)
    elif is_by_hand(os.environ):
        # Somebody may read the output of this process alone.
        time.sleep(HEAD_START_SECONDS)
        refer_to_rank_zero()


class Audience(enum.Enum):
    """For whom this process is to report a failure that all ranks share."""

    NOBODY = "another rank reports it"
    ALL = "no other rank reports it"
    NODE = "rank 0 is on another node, and may have reported it"


def find_audience() -> Audience:
    """Return whether this process is to report a failure that all ranks share.

    Returns once that is clear: with rank 0 at once, with the others after its head start, or when
    it has reported it and gone.
    """
    launcher, rank = innermost(os.environ, ancestors()) or (None, None)
    if launcher is None or rank is None or not launcher.processes:
        return Audience.ALL if may_report(os.environ) else Audience.NOBODY

    def look() -> dict[int, Seen]:
        return {other: seen for other, seen in ranks_of_node(launcher).items() if other != rank}

    expected = max(len(look()), _local_world_size(launcher) - 1)
    if rank != 0 and not _rank_zero_is_silent(launcher, rank, look):
        return Audience.NOBODY
    if not _has_lock(process_of(launcher)):
        return Audience.NOBODY
    # None leaves before the one that has the lock: one that was here and has left has reported it.
    if rank != 0 and len(look()) < expected:
        return Audience.NOBODY
    # Most launchers end the job once rank 0 has reported it and left. srun may let the others be.
    is_elsewhere = rank != 0 and launcher.name == "srun" and 0 not in look()
    return Audience.NODE if is_elsewhere else Audience.ALL


def _local_world_size(launcher: Launcher) -> int:
    value = next((os.environ[key] for key in launcher.local_world_size if key in os.environ), "")
    return int(value) if WHOLE_NUMBER.fullmatch(value) else 0


def innermost(env: Environment, above: Sequence[str]) -> tuple[Launcher, int | None] | None:
    """Return which launcher above has started this process, and its rank, if they can be known.

    For what has to be reported where there can be no claim.
    """
    row = nearest(launchers_in(env), above)
    if row is None:
        return None
    value = next((env[key] for key in row.rank if key in env), "")
    return row, int(value) if WHOLE_NUMBER.fullmatch(value) else None


def is_by_hand(env: Environment) -> bool:
    """Return whether each process may have been started alone, with an output of its own."""
    launchers = launchers_in(env)
    return not launchers or any(not row.mpi_families for row in launchers)


def may_report(env: Environment) -> bool:
    """Return whether no launcher in the environment calls this process anything but rank 0.

    For what has to be reported before there is a claim, or where there can be none.
    """
    ranks = [env.get(key, "") for key in ("RANK", *(row.rank[0] for row in launchers_in(env)))]
    return all(int(rank) == 0 for rank in ranks if WHOLE_NUMBER.fullmatch(rank))


def let_rank_zero_end() -> None:
    """Return when rank 0 has seen that another one reported, where its launcher lets it run."""
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
    """Give rank 0 its head start, and return whether it has not reported anything by then."""
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
    and the one that has the lock may not have reported it yet. The lock lasts as long as this
    process.
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


@dataclass(frozen=True, slots=True)
class Seen:
    """One rank of this node, as its processes show it.

    Attributes:
        pid: its last process, which is the rank itself where a script starts it.
        name: of that process.
        marks: what it says that it is at.
    """

    pid: int
    name: str
    marks: frozenset[str]

    @property
    def is_waiting(self) -> bool:
        return IN_MPI_INIT in self.marks


@contextmanager
def marked(name: str) -> Iterator[None]:
    """Have other ranks of this node see what this one is at during the body."""
    descriptor = mark(name)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def mark(name: str) -> int | None:
    """Have other ranks of this node see what this one is at, until the descriptor is closed."""
    return os.memfd_create(name) if hasattr(os, "memfd_create") else None


def process_of(launcher: Launcher, proc: Path = PROC) -> int | None:
    """Return the launcher's process above this one; None if it cannot be seen."""
    for pid in processes_above(proc=proc):
        if launcher.processes & {*names_of(pid, proc)}:
            return pid
    return None


def ranks_of_node(launcher: Launcher, proc: Path = PROC) -> dict[int, Seen]:
    """Return the ranks that the launcher's process above this one has started; empty if unseen."""
    root = process_of(launcher, proc)
    if root is None:
        return {}
    ranks: dict[int, Seen] = {}
    for pid in _descendants(root, proc):
        rank = _rank(launcher, pid, proc)
        if rank is None or (rank in ranks and ranks[rank].marks):
            continue
        names = names_of(pid, proc)
        ranks[rank] = Seen(pid, names[-1] if names else "?", marks_of(pid, proc))
    return ranks


def missing_ranks_message(
    ranks: Mapping[int, Seen], world_size: int | None, seconds: float, elsewhere: Sequence[str] = ()
) -> str:
    """Return a message that names who has not come to MPI_Init, as far as this node shows.

    Args:
        ranks: of this node.
        world_size: number of all ranks, where the launcher says it.
        seconds: limit that has passed.
        elsewhere: the job's other hosts, where they are known.
    """
    began = f"MPI_Init has not come back within {seconds:.0f} s"
    missing = {rank: seen for rank, seen in sorted(ranks.items()) if not seen.is_waiting}
    if missing:
        shown = [f"{rank} (process {seen.pid}, {seen.name})" for rank, seen in missing.items()]
        return (
            f"{began}: on this node rank {listed(shown, _SHOWN)} has not called it. All programs "
            "that one mpirun starts have to."
        )
    if ranks and world_size is not None and len(ranks) < world_size:
        others = ranges(sorted(set(range(world_size)) - ranks.keys()))
        where = f" on {listed(elsewhere, _SHOWN)}" if elsewhere else ""
        return (
            f"{began}: the {len(ranks)} ranks of this node wait in it, so that one of ranks "
            f"{listed(others, _SHOWN)}{where} has not called it, or the network does not let them "
            "meet."
        )
    return f"{began}: some rank has not called it, or the network does not let them meet."


def _descendants(root: int, proc: Path) -> Iterator[int]:
    """Yield the processes below one, parents before their children."""
    children: dict[int, list[int]] = {}
    for entry in proc.iterdir():
        if entry.name.isdecimal():
            pid = int(entry.name)
            children.setdefault(parent_of(pid, proc), []).append(pid)
    below = list(children.get(root, ()))
    while below:
        pid = below.pop(0)
        yield pid
        below.extend(children.get(pid, ()))


def _rank(launcher: Launcher, pid: int, proc: Path) -> int | None:
    """Return the rank that a process was started as; None if it is none, or another user's."""
    try:
        entries = (proc / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return None
    environment = dict(entry.partition(b"=")[::2] for entry in entries)
    for variable in launcher.rank:
        value = environment.get(variable.encode(), b"")
        if value.isdigit():
            return int(value)
    return None


def marks_of(pid: int, proc: Path) -> frozenset[str]:
    """Return the marks that a process holds."""
    found = set()
    with suppress(OSError):
        for descriptor in (proc / str(pid) / "fd").iterdir():
            with suppress(OSError):
                # "/memfd:NAME (deleted)"
                name = str(descriptor.readlink()).partition(":")[2].split(" ")[0]
                if name.startswith(_MARKS):
                    found.add(name)
    return frozenset(found)
