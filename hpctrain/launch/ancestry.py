"""The processes above this one, by name: who started it where variables of several launchers stay.

Variables are inherited through any number of launchers; only the process tree tells which of them
is the innermost.
"""

from __future__ import annotations

import os
from pathlib import Path


def ancestors(process: int | None = None, proc: Path = Path("/proc")) -> tuple[str, ...]:
    """Return the names of the processes above one (this one), the nearest first.

    A Python process started as `python -m MODULE` gives its module too. Empty where the system
    does not tell: not Linux, or above the first process of a container.
    """
    names: list[str] = []
    pid = os.getpid() if process is None else process
    while True:
        pid = _parent(proc / str(pid))
        if pid <= 0:
            return tuple(names)
        names += _names(proc / str(pid))


def _parent(entry: Path) -> int:
    try:
        # "pid (name) state parent ...": the name may hold spaces and parentheses itself.
        fields = (entry / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:  # gone, of another user under hidepid, or no /proc here
        return 0
    return int(fields.rpartition(")")[2].split()[1])


def _names(entry: Path) -> list[str]:
    try:
        name = (entry / "comm").read_text(encoding="utf-8", errors="replace").strip()
        words = (entry / "cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
    except OSError:
        return []
    module = words.index("-m") + 1 if name.startswith("python") and "-m" in words else len(words)
    return [name, *words[module : module + 1]]
