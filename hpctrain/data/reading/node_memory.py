"""How much memory a job may still take on this node."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from hpctrain.utils.proc import cgroup

SHARED = Path("/dev/shm")


def host_memory() -> tuple[int, int]:
    """Return free and total bytes of what this job may take: of the node, or of its cgroup."""
    memory = psutil.virtual_memory()
    free, total = memory.available, memory.total
    for root, controller, limit_name, used_name, cache_name in (
        ("/sys/fs/cgroup", "", "memory.max", "memory.current", "inactive_file"),
        (
            "/sys/fs/cgroup/memory",
            "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ):
        group = cgroup(root, controller)
        # A scheduler sets the limit of the job, above the group of its step.
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            try:
                limit = (folder / limit_name).read_text(encoding="ascii").strip()
                used = int((folder / used_name).read_text(encoding="ascii"))
                stat = (folder / "memory.stat").read_text(encoding="ascii")
            except OSError:
                continue
            if limit.isdecimal() and int(limit) < total:
                total = int(limit)
                # Cached pages of files are given up before anything is killed.
                cached = dict(line.split() for line in stat.splitlines()).get(cache_name, "0")
                free = min(free, total - used + int(cached))
    return free, total


def shared_memory() -> int:
    """Return the free bytes of /dev/shm; 0 where there is none."""
    try:
        found = os.statvfs(SHARED)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize
