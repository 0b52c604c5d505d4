"""What this process's control groups allow it: processor time and memory.

A scheduler sets a limit on the group of a job, a container runtime on that of a pod: somewhere
above the group of this process, which is free itself. So every level counts, of version 2 and of
each controller of version 1, as far up as they are mounted here. Standard library only.

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

from hpctrain.utils.proc import PROC

_OCTAL = re.compile(r"\\([0-7]{3})")


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


def folders(controller: str, proc: Path = PROC) -> list[Path]:
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
    for folder in folders("", proc):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        quotas.append((folder, quota, period))
    for folder in folders("cpu", proc):
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
        for folder in folders(controller, proc):
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
        for folder in folders(controller, proc)[:1]:
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
