"""Where this process is: in an allocation that has more, below a rank, in a shell, on a login node.

What the environment alone tells is in `hpctrain.launch.allocation`; here are the process tree and
the file system.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
from contextlib import suppress
from pathlib import Path

from hpctrain.errors import LaunchError
from hpctrain.launch.allocation import alone_in, read_text
from hpctrain.launch.ancestry import names_of
from hpctrain.launch.arrivals import mark, marks_of
from hpctrain.launch.launchers import Environment, launchers_in
from hpctrain.launch.table import Launcher
from hpctrain.topology import Topology
from hpctrain.utils.proc import PROC, ancestors

RANK = "hpctrain-rank"
"""The mark of a process that has its place in a world."""

LOGIN_THREADS = 2

_SHOWN = 8

_SHELL = re.compile(r"-?(?:ba|da|a|k|mk|z|fi|c|tc)?sh")
_TERMINAL = ("/dev/pts/", "/dev/tty")
_CLIENTS = {
    # what submits jobs, and a file or a variable that is there only where it leads to a cluster
    "sbatch": ("/etc/slurm/slurm.conf", "/run/slurm/conf/slurm.conf", "SLURM_CONF"),
    "qsub": ("/etc/pbs.conf", "/var/spool/torque/server_name", "PBS_CONF_FILE", "SGE_ROOT"),
    "bsub": ("LSF_ENVDIR",),
}
_JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID", "FLUX_JOB_ID", "COBALT_JOBID")
_GROUP_OF_A_JOB = re.compile(r"job_\d|jobid/|pbs_jobs|/lsf/|/flux-")


def look_around_alone() -> None:
    """Say what one process without a launcher leaves unused.

    Raises:
        LaunchError: if others like it would train alone beside it.
    """
    step = next((row for row in launchers_in(os.environ) if row.name == "srun"), None)
    is_shells = shell_above(step) is not None
    found = alone_in(os.environ, socket.gethostname(), read_text, is_shells=is_shells)
    if found is None:
        return
    if found.is_refused:
        raise LaunchError(found.text)
    _note(found.text)


def check_own_place(launcher: Launcher, world_size: int | None) -> None:
    """Check that the place in the world that the environment tells is this process's own.

    Raises:
        LaunchError: if it is that of a rank above this process, or of an interactive shell.
    """
    if not launcher.processes:  # by hand: nothing tells where those processes begin
        return
    rank = rank_above(launcher)
    if rank is not None:
        raise LaunchError(
            f"this process was started by process {rank}, which has the place in the world that "
            f"{launcher.label} has given out, and nobody can take it twice. Start it without the "
            f"launcher's variables: {_unset(os.environ)}",
        )
    # srun --pty: a terminal for the first task, and nothing to read for the others.
    shell = shell_above(launcher) if launcher.name == "srun" and world_size != 1 else None
    if shell is not None:
        raise LaunchError(
            f"the shell that this was typed in (process {shell}) is itself one of {world_size} "
            "tasks of a step of Slurm, and the others run no hpctrain. Start them from there with: "
            f"srun --overlap -n {world_size} python -m hpctrain ...; one process with: "
            f"{_unset(os.environ)}",
        )


def take_place() -> None:
    """Have processes below this one see that its place in the world is taken."""
    mark(RANK)


def spare_login_node(topology: Topology) -> None:
    """Take few cores where a cluster's jobs are submitted and others work, and say so.

    OMP_NUM_THREADS, where it is set, is the user's word.
    """
    if not is_login_node(os.environ):
        return
    limited = "OMP_NUM_THREADS" not in os.environ and hasattr(os, "sched_setaffinity")
    if topology.is_rank_zero:
        how = (
            f"takes {LOGIN_THREADS} cores a process; OMP_NUM_THREADS says otherwise"
            if limited
            else "takes what OMP_NUM_THREADS says"
        )
        _note(
            f"{topology.host} has a batch system and this is no job of it: a login node? This {how}"
        )
    if limited:
        cores = sorted(os.sched_getaffinity(0))
        # Not the same two for everybody.
        first = os.getuid() + LOGIN_THREADS * topology.local_rank
        with suppress(OSError):
            os.sched_setaffinity(
                0, {cores[(first + number) % len(cores)] for number in range(LOGIN_THREADS)}
            )


def is_login_node(env: Environment, proc: Path = PROC) -> bool:
    """Return whether a batch system takes jobs here, and this process is in none."""
    if any(env.get(variable) for variable in _JOBS):
        return False
    if not any(
        shutil.which(client, path=env.get("PATH")) and any(_is_there(sign, env) for sign in signs)
        for client, signs in _CLIENTS.items()
    ):
        return False
    # One that came by ssh into an allocation has no variables.
    return _GROUP_OF_A_JOB.search(read_text(str(proc / "self" / "cgroup"))) is None


def rank_above(launcher: Launcher, proc: Path = PROC) -> int | None:
    """Return the process between this one and its launcher's that is a rank; None if none is."""
    for pid in ancestors(proc=proc):
        if launcher.processes & {*names_of(pid, proc)}:
            return None
        if RANK in marks_of(pid, proc) or "/mpi4py/MPI." in read_text(
            str(proc / str(pid) / "maps")
        ):
            return pid
    return None


def shell_above(launcher: Launcher | None, proc: Path = PROC) -> int | None:
    """Return the interactive shell between this process and its launcher's; None if none is."""
    if launcher is None:
        return None
    found = None
    for pid in ancestors(proc=proc):
        if launcher.processes & {*names_of(pid, proc)}:
            return found
        if found is None and _is_interactive(pid, proc):
            found = pid
    return None


def _is_interactive(pid: int, proc: Path) -> bool:
    """Return whether a process is a shell at a terminal that runs no script."""
    words = read_text(str(proc / str(pid) / "cmdline")).rstrip("\0").split("\0")
    if not _SHELL.fullmatch(Path(words[0]).name):
        return False
    if any(not word.startswith("-") or word == "-c" for word in words[1:]):
        return False
    with suppress(OSError):
        return str((proc / str(pid) / "fd" / "0").readlink()).startswith(_TERMINAL)
    return False


def _unset(env: Environment) -> str:
    """Return how to start a command without the variables of a world."""
    from hpctrain.launch.ranks import without_rank

    names = sorted(set(env) - set(without_rank(env)))
    if len(names) <= _SHOWN:
        return f"env {' '.join(f'-u {name}' for name in names)} ..."
    families = dict.fromkeys(f"${{!{name.partition('_')[0]}_*}}" for name in names if "_" in name)
    single = [name for name in names if "_" not in name]
    return f"in bash, after: unset {' '.join([*families, *single])}"


def _is_there(sign: str, env: Environment) -> bool:
    return Path(sign).exists() if sign.startswith("/") else bool(env.get(sign))


def _note(text: str) -> None:
    with suppress(OSError):
        sys.stderr.write(f"hpctrain: note: {text}\n")
        sys.stderr.flush()
