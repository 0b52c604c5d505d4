"""What the kernel reports: of processes in /proc, and what the control groups of this one allow it.

A scheduler sets a limit on the group of a job, a container runtime on that of a pod: somewhere
above the group of this process, which is free itself. So every level counts, of version 2 and of
each controller of version 1, as far up as they are mounted here.

Standard library only: the watchdog uses it.

Source: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1 of the Linux kernel; man 7 cgroups,
man 5 proc_pid_mountinfo.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")

# Positions in `stat_fields`. Source: man 5 proc_pid_stat, less the two that stand before them.
STATE, PARENT, FLAGS, START_TIME, EXIT_CODE = 0, 1, 6, 19, 49

_OCTAL = re.compile(r"\\([0-7]{3})")


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
    return _namespace("pid")


def time_namespace() -> str:
    """Return what names the clock that start times are given by here; "" before Linux 5.6."""
    return _namespace("time")


def network_namespace() -> str:
    """Return what names the space in which abstract addresses mean something; "" if unknown."""
    return _namespace("net")


def _namespace(kind: str) -> str:
    try:
        return str((PROC / "self/ns" / kind).readlink())
    except OSError:
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
    """Tell whether a process of this PID namespace lives; None if that cannot be determined.

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


@dataclass(frozen=True, slots=True)
class Quota:
    """Processor time that the processes of a group share.

    Attributes:
        group: names the group on this machine, in whatever namespace it is seen.
        cpus: as many processors' time.
    """

    group: str
    cpus: float


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """Memory that the processes of a group share.

    Attributes:
        limit: in bytes.
        used: of these, without what the kernel gives up before it kills anything.
    """

    limit: int
    used: int


def cgroup_folders(controller: str, proc: Path = PROC) -> list[Path]:
    """Return the folders of the groups that this process is in, the innermost first.

    Args:
        controller: of version 1, such as "memory"; "" for version 2.
        proc: where the process file system is.
    """
    path = _own_path(controller, proc)
    if path is None:
        return []
    for root, mounted in _mounts(controller, proc):
        # A container may see its own group as the root, and a path from outside of it.
        inside = path.removeprefix(root).strip("/") if _is_below(path, root) else ""
        own = mounted / inside
        if own.is_dir():
            levels = len(Path(inside).parts)
            return [own, *own.parents[:levels]]
    return []


def cpu_quotas(proc: Path = PROC) -> list[Quota]:
    """Return the quotas of all groups that this process is in; none where there are none."""
    quotas = []
    for folder in cgroup_folders("", proc):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        quotas.append((folder, quota, period))
    for folder in cgroup_folders("cpu", proc):
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        quotas.append((folder, quota, period))
    return [
        Quota(_name(folder), int(quota) / int(period))
        for folder, quota, period in quotas
        if quota.isdecimal() and period.isdecimal() and int(quota) > 0 and int(period) > 0
    ]


def memory_limits(proc: Path = PROC) -> Iterator[MemoryLimit]:
    """Yield the limits of all groups that this process is in.

    Above `memory.high` nothing is killed, but all that asks for memory is held up.
    """
    for controller, limits, used, cache in (
        ("", ("memory.max", "memory.high"), "memory.current", "inactive_file"),
        ("memory", ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
    ):
        for folder in cgroup_folders(controller, proc):
            found = [_read(folder / name) for name in limits]
            known = [int(limit) for limit in found if limit.isdecimal()]
            taken = _read(folder / used)
            if known and taken.isdecimal():
                # Cached pages of files are given up before anything is killed.
                cached = _table(folder / "memory.stat").get(cache, 0)
                yield MemoryLimit(min(known), max(0, int(taken) - cached))


def num_oom_kills(proc: Path = PROC) -> int:
    """Return how many processes of this process's group the kernel has killed for memory."""
    for controller, name in (("memory", "memory.oom_control"), ("", "memory.events")):
        for folder in cgroup_folders(controller, proc)[:1]:
            table = _table(folder / name)
            if "oom_kill" in table:
                return table["oom_kill"]
    return 0


def allowed_cores() -> set[int]:
    """Return the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def cpu_budget() -> int:
    """Return how many threads of this process can run at once: by its cores, and by quotas.

    What others in the same groups take is not known here.
    """
    return min([len(allowed_cores()), *(max(1, int(quota.cpus)) for quota in cpu_quotas())])


def _own_path(controller: str, proc: Path) -> str | None:
    for line in _read(proc / "self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == controller or (controller and controller in controllers.split(",")):
            return path
    return None


def _mounts(controller: str, proc: Path) -> Iterator[tuple[str, Path]]:
    """Yield root and place of every mount of a hierarchy."""
    for line in _read(proc / "self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        is_version_2 = kind[0] == "cgroup2" and not controller
        is_version_1 = kind[0] == "cgroup" and controller and controller in kind[2].split(",")
        if is_version_2 or is_version_1:
            yield fields[3].rstrip("/"), Path(_unescaped(fields[4]))


def _is_below(path: str, root: str) -> bool:
    return (path == root or path.startswith(f"{root}/")) and ".." not in path.split("/")


def _unescaped(path: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), path)


def _name(folder: Path) -> str:
    try:
        found = folder.stat()
    except OSError:
        return str(folder)
    return f"{found.st_dev}:{found.st_ino}"


def _table(path: Path) -> dict[str, int]:
    """Return a file of lines of a word and a number."""
    words = [line.split() for line in _read(path).splitlines()]
    return {line[0]: int(line[1]) for line in words if len(line) == 2 and line[1].isdecimal()}


def _read(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").strip()
    return ""


def raise_open_files() -> None:
    """Allow as many open files as the system lets us; every connection is one."""
    try:
        import resource
    except ImportError:  # not on this system
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def most_open_files() -> int | None:
    """Return how many files this process may have open; None: as many as it likes."""
    try:
        import resource
    except ImportError:  # not on this system
        return None
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if most == resource.RLIM_INFINITY else most
