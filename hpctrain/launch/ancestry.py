"""The processes above this one, by name: who started it where variables of several launchers stay.

Variables are inherited through any number of launchers; only the process tree tells which of them
is the innermost. What a process is called is an alias there: Open MPI 4 forks its ranks from a
process that bears the name it was called by, such as mpiexec, and sites put scripts of that name
before any launcher. Its executable counts where it can be read.
"""

from __future__ import annotations

import re
from pathlib import Path

from hpctrain.utils.proc import PROC, executable_of
from hpctrain.utils.proc import ancestors as processes_above

_INTERPRETER = re.compile(
    r"(?:python|pypy|perl|ruby|lua|tclsh)[0-9.]*|(?:ba|da|a|k|mk|z|fi|c|tc)?sh[0-9.]*|busybox"
)
_TITLE_LENGTH = 15  # of TASK_COMM_LEN of the kernel's sched.h, less the byte at its end
# Names of links, and of scripts that start a launcher in their turn: they tell nothing.
_COMMAND_OF_LAUNCHER = re.compile(r"(?:mpirun|mpiexec|orterun|prterun|oshrun|shmemrun)\b.*")
# Nix, Guix, Spack and vendors put a script before the real one, which they rename.
_RENAMED = re.compile(r"(?:[-_.](?:wrapped|real|bin|exe|orig))+_?$")


def ancestors(process: int | None = None, proc: Path = PROC) -> tuple[str, ...]:
    """Return the names of the processes above one (this one), the nearest first.

    An executable is followed by what the process calls itself, if that is another name, and by what
    it runs if it is an interpreter: a script, or the module of `python -m`.
    Empty where the system does not tell: not Linux, or above the first process of a container.
    """
    above = processes_above(process, proc)
    return tuple(name for pid in above for name in names_of(pid, proc))


def names_of(pid: int, proc: Path = PROC) -> list[str]:
    """Return what a process is called: executable, title, script; none where it is not seen."""
    entry = proc / str(pid)
    try:
        title = (entry / "comm").read_text(encoding="utf-8", errors="replace").rstrip("\n")
        words = (entry / "cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
    except OSError:
        return []
    name, called = executable_of(pid, proc), Path(words[0]).name
    if not name:
        # Daemons write what they like into words[0]; it helps out where the title has been cut.
        is_cut = len(title) == _TITLE_LENGTH and called.startswith(title)
        is_script = _is_interpreter(called) and not _is_interpreter(title)
        name = called if is_cut or is_script else title
    # Debian's slurmstepd runs slurmstepd-wlm.
    others = [title, *_script(words)] if _is_interpreter(name) else [title]
    told = [
        other
        for other in others
        if not _COMMAND_OF_LAUNCHER.fullmatch(other) and not _is_interpreter(other)
    ]
    return list(dict.fromkeys([_plain(name), *told]))


def _is_interpreter(name: str) -> bool:
    return _INTERPRETER.fullmatch(name) is not None


def _script(words: list[str]) -> list[str]:
    """Return the module, or the name of the script, that an interpreter was asked to run."""
    if "-m" in words:
        return words[words.index("-m") + 1 :][:1]
    if "-c" in words[:3]:
        return []
    return [Path(word).name for word in words[1:] if word and not word.startswith("-")][:1]


def _plain(name: str) -> str:
    """Return the name that an executable had before somebody put a script in its place."""
    return _RENAMED.sub("", name).lstrip(".") or name
