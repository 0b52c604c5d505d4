"""How far the ranks of this node have come, seen from outside.

Nothing can be sent before MPI runs. The process tree tells which processes a launcher has started
here, their environment which ranks they are, and a file in memory that they hold open, a mark, what
they are at, such as that they wait in MPI_Init.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from hpctrain.launch.environment import names_of
from hpctrain.launch.launchers import Launcher
from hpctrain.utils.proc import PROC, ancestors, parent_of
from hpctrain.utils.text import listed, ranges

IN_MPI_INIT = "hpctrain-in-mpi-init"

_MARKS = "hpctrain-"
_SHOWN = 8


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
    above = (pid for pid in ancestors(proc=proc) if launcher.processes & {*names_of(pid, proc)})
    return next(above, None)


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


def tell_missing(
    ranks: Mapping[int, Seen], world_size: int | None, seconds: float, elsewhere: Sequence[str] = ()
) -> str:
    """Return a message that names who has not come to MPI_Init, as far as this node shows.

    Args:
        ranks: of this node.
        world_size: number of all ranks, where the launcher tells it.
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
    told = dict(entry.partition(b"=")[::2] for entry in entries)
    for variable in launcher.rank:
        value = told.get(variable.encode(), b"")
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
