"""Does a person watch this job?

A rank's own streams do not tell. MPICH gives its ranks pipes also where the job was started at a
terminal; Open MPI gives them pipes and a pseudo-terminal as stdout, also where all its output goes
to a file. What tells is the stderr of the launcher itself, further up among the ancestors.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hpctrain.utils import proc

STDERR = 2

LAUNCHERS = frozenset({"mpirun", "mpiexec", "mpiexec.hydra", "orterun", "prterun", "prun"})
"""Programs that carry the output of their ranks to wherever their own goes."""


@dataclass(frozen=True, slots=True)
class Process:
    """One ancestor: its id, and the name of its executable, or as it is called."""

    pid: int
    name: str


def columns_watched(
    own: int | None, ancestors: Iterable[Process], columns_of: Callable[[int], int | None]
) -> int | None:
    """Return the width of the terminal at which a person watches, None if nobody does.

    Args:
        own: width of this process's own terminal; None: its stderr is none.
        ancestors: from the parent upwards; read no further than needed.
        columns_of: width of the terminal that a process writes to, None if it is none.
    """
    for process in ancestors:
        if process.name in LAUNCHERS:
            return columns_of(process.pid)
    return own


def terminal_columns() -> int | None:
    """Return the width of the terminal at which a person watches this job, None if nobody does."""
    if os.environ.get("TERM") == "dumb":
        return None
    return columns_watched(_columns(STDERR), _ancestors(), _columns_of)


def _ancestors() -> Iterator[Process]:
    """Walk up from the parent, as far as /proc shows."""
    for pid in proc.ancestors():
        # mpirun may be a link to what has another name, or a script.
        executable = proc.executable_of(pid)
        yield Process(pid, executable if executable in LAUNCHERS else proc.name_of(pid))


def _columns_of(pid: int) -> int | None:
    """Return the width of the terminal that a process's stderr leads to, None if to none.

    A process of another user keeps its streams to itself, which counts as none.
    """
    path = Path(f"/proc/{pid}/fd/{STDERR}")
    try:
        if not stat.S_ISCHR(path.stat().st_mode):  # opening a pipe would make us one of its ends
            return None
        # Must not become this process's controlling terminal: it would get its signals.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return _columns(descriptor)
    finally:
        os.close(descriptor)


def _columns(descriptor: int) -> int | None:
    """Return the width of a terminal, None if the descriptor is of something else."""
    try:
        return os.get_terminal_size(descriptor).columns or 80  # 0 where none was ever set
    except OSError:
        return None
