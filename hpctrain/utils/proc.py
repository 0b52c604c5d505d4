"""What the kernel tells of processes in /proc. Standard library only: the watchdog uses it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")

# Positions in `stat_fields`. Source: man 5 proc_pid_stat, less the two that stand before them.
STATE, PARENT, FLAGS, START_TIME, EXIT_CODE = 0, 1, 6, 19, 49


def stat_fields(pid: int, proc: Path = PROC) -> list[str]:
    """Return the fields of a process's `stat` from its state on; empty if there is none to see.

    So it is where the process is gone or of another user under hidepid, and outside Linux.
    """
    # "pid (name) state parent ...": the name may hold spaces, brackets and line feeds itself.
    return _stat(pid, proc).rpartition(")")[2].split()


def name_of(pid: int, proc: Path = PROC) -> str:
    """Return the name of a process as the kernel has it, at most 15 characters; "" if unseen."""
    return _stat(pid, proc).partition("(")[2].rpartition(")")[0]


def executable_of(pid: int, proc: Path = PROC) -> str:
    """Return the name of what a process runs; "" where that cannot be read, as of other users.

    The name that it was called by may be a link's, which says nothing of what stands behind it.
    """
    try:
        path = str((proc / str(pid) / "exe").readlink())
    except OSError:
        return ""
    return Path(path.removesuffix(" (deleted)")).name


def parent_of(pid: int, proc: Path = PROC) -> int:
    """Return the process that started another; 0 if there is none, or none to see."""
    fields = stat_fields(pid, proc)
    return int(fields[PARENT]) if fields else 0


def ancestors(pid: int | None = None, proc: Path = PROC) -> Iterator[int]:
    """Yield the processes above one (this one), the nearest first, as far as can be seen."""
    above = parent_of(os.getpid() if pid is None else pid, proc)
    while above > 0:
        yield above
        above = parent_of(above, proc)


def start_time(pid: int, proc: Path = PROC) -> str | None:
    """Return when a process began, in clock ticks since the boot; None if there is none.

    A process id is used again; together with its start it is not.
    """
    fields = stat_fields(pid, proc)
    return fields[START_TIME] if fields else None


def boot_id() -> str:
    """Return what names this boot of this machine, in all of its containers; "" if unknown."""
    try:
        return (PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:  # not Linux
        return ""


def pid_namespace() -> str:
    """Return what names the space in which this process's ids mean something; "" if unknown."""
    try:
        return str((PROC / "self/ns/pid").readlink())
    except OSError:
        return ""


def time_namespace() -> str:
    """Return what names the clock that start times are given by here; "" if unknown."""
    try:
        return str((PROC / "self/ns/time").readlink())
    except OSError:  # Linux before 5.6
        return ""


def shows_own_processes() -> bool:
    """Tell whether /proc is that of this process's own ids.

    In a PID namespace made without mounting it anew it shows those of the one above: other
    processes under the same numbers.
    """
    try:
        return str((PROC / "self").readlink()) == str(os.getpid())
    except OSError:
        return False


def lives(pid: int, started: str | None) -> bool | None:
    """Tell whether a process of this PID namespace lives; None if that cannot be told.

    Args:
        pid: its id, which may be that of another process by now.
        started: when it began, see `start_time`; None: unknown.
    """
    if pid <= 0:
        return None
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # of another user
    fields = stat_fields(pid) if shows_own_processes() else []
    if not fields:
        return None  # there is one of this number, and /proc hides which
    if fields[STATE] in "ZX" and not _has_threads(pid):
        return False
    return None if started is None else fields[START_TIME] == started


def _has_threads(pid: int) -> bool:
    """Tell whether threads go on where the first one of a process has ended."""
    try:
        return len(list((PROC / str(pid) / "task").iterdir())) > 1
    except OSError:
        return False


def _stat(pid: int, proc: Path) -> str:
    try:
        return (proc / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
