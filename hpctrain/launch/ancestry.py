"""The processes above this one, by name: who started it where variables of several launchers stay.

Variables are inherited through any number of launchers; only the process tree tells which of them
is the innermost.
"""

from __future__ import annotations

from pathlib import Path

from hpctrain.utils.proc import PROC
from hpctrain.utils.proc import ancestors as processes_above


def ancestors(process: int | None = None, proc: Path = PROC) -> tuple[str, ...]:
    """Return the names of the processes above one (this one), the nearest first.

    A Python process started as `python -m MODULE` gives its module too. Empty where the system
    does not tell: not Linux, or above the first process of a container.
    """
    above = processes_above(process, proc)
    return tuple(name for pid in above for name in _names(proc / str(pid)))


def _names(entry: Path) -> list[str]:
    try:
        name = (entry / "comm").read_text(encoding="utf-8", errors="replace").strip()
        words = (entry / "cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
    except OSError:
        return []
    module = words.index("-m") + 1 if name.startswith("python") and "-m" in words else len(words)
    return [name, *words[module : module + 1]]
