"""Who of this node's ranks has come to MPI_Init, seen from outside while it blocks.

Nothing can be sent before MPI runs. The process tree tells which processes a launcher has started
here, their environment which ranks they are, and an open file of ours that they wait in MPI_Init.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hpctrain.launch.ancestry import names_of
from hpctrain.launch.table import Launcher
from hpctrain.utils.proc import PROC, ancestors, parent_of
from hpctrain.utils.text import listed

_MARK = "hpctrain-in-mpi-init"
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Seen:
    """One rank of this node, as its processes show it.

    Attributes:
        pid: its last process, which is the rank itself where a script starts it.
        name: of that process.
        is_waiting: it waits in MPI_Init.
    """

    pid: int
    name: str
    is_waiting: bool


@contextmanager
def waiting_in_mpi_init() -> Iterator[None]:
    """Have other ranks see that this one waits in MPI_Init."""
    if not hasattr(os, "memfd_create"):
        yield
        return
    mark = os.memfd_create(_MARK)
    try:
        yield
    finally:
        os.close(mark)


def ranks_of_node(launcher: Launcher, proc: Path = PROC) -> dict[int, Seen]:
    """Return the ranks that the launcher's process above this one has started; empty if unseen."""
    above = (pid for pid in ancestors(proc=proc) if launcher.processes & {*names_of(pid, proc)})
    root = next(above, None)
    if root is None:
        return {}
    ranks: dict[int, Seen] = {}
    for pid in _descendants(root, proc):
        rank = _rank(launcher, pid, proc)
        if rank is None or (rank in ranks and ranks[rank].is_waiting):
            continue
        names = names_of(pid, proc)
        ranks[rank] = Seen(pid, names[-1] if names else "?", _waits(pid, proc))
    return ranks


def tell_missing(ranks: Mapping[int, Seen], world_size: int | None, seconds: float) -> str:
    """Return a message that names who has not come to MPI_Init, as far as this node shows."""
    began = f"MPI_Init has not come back within {seconds:.0f} s"
    missing = {rank: seen for rank, seen in sorted(ranks.items()) if not seen.is_waiting}
    if missing:
        shown = [f"{rank} (process {seen.pid}, {seen.name})" for rank, seen in missing.items()]
        return (
            f"{began}: on this node rank {listed(shown, _SHOWN)} has not called it. All programs "
            "that one mpirun starts have to."
        )
    if ranks and world_size is not None and len(ranks) < world_size:
        return (
            f"{began}: the {len(ranks)} ranks of this node wait in it, so that one of the other "
            f"{world_size - len(ranks)} has not called it, or the network does not let them meet."
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


def _waits(pid: int, proc: Path) -> bool:
    """Tell whether a process holds the mark of those that wait in MPI_Init."""
    try:
        for descriptor in (proc / str(pid) / "fd").iterdir():
            if _MARK in str(descriptor.readlink()):
                return True
    except OSError:
        return False
    return False
