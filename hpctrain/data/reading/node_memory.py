"""How much memory a job may still take on this node."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from hpctrain.utils.proc import memory_limits

SHARED = Path("/dev/shm")


def host_memory() -> tuple[int, int]:
    """Return free and total bytes of what this job may take: of its control groups, or the node."""
    memory = psutil.virtual_memory()
    free, total = memory.available, memory.total
    for group in memory_limits():
        total = min(total, group.limit)
        free = min(free, max(0, group.limit - group.used))
    return free, total


def shared_memory() -> int:
    """Return the free bytes of /dev/shm; 0 where there is none."""
    try:
        found = os.statvfs(SHARED)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize
