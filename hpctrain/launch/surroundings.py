"""Where this process is: in an allocation that has more, below a rank, in a shell, on a login node.

One process where a batch system has given more is warned of what was forgotten, and what to start
instead: one process of a job of four tasks is often meant. Where several of them would train alone,
each as if it were the only one, it is refused.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hpctrain.errors import LaunchError
from hpctrain.launch.environment import Environment, launchers_in, names_of
from hpctrain.launch.launchers import Launcher
from hpctrain.launch.reporter import mark, marks_of
from hpctrain.topology import Topology
from hpctrain.utils.proc import PROC, ancestors

RANK = "hpctrain-rank"
"""The mark of a process that has its place in a world."""

LOGIN_THREADS = 2

_SHOWN = 8
_LOOKED_UP = 64
_DATAGRAMS = socket.SOCK_DGRAM

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
# Where pam_slurm_adopt puts who comes by ssh to a node of a job. Source: Slurm's pam_slurm_adopt.
_ADOPTED = re.compile(r"/job_(\d+)/step_extern\b")

# How a launcher is asked for several processes; the others as mpirun is.
_ASKED = {
    "alps": "aprun -n",
    "pals": "mpiexec -n",
    "jsrun": "jsrun -n",
    "flux": "flux run -n",
    "torchrun": "torchrun --nproc-per-node",
}

# The shell of salloc, where the site starts it on a node, is a step of its own that gives way.
# Source: SLURM_INTERACTIVE_STEP of Slurm's slurm.h.
_INTERACTIVE_STEP = "4294967290"
_STEP_VARIABLES = ("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")


def look_around_alone(launcher: Launcher | None = None) -> None:
    """Say what one process leaves unused: without a launcher, or the only one of its launcher.

    Raises:
        LaunchError: if others like it would train alone beside it.
    """
    if launcher is None:
        step = next((row for row in launchers_in(os.environ) if row.name == "srun"), None)
        is_shells = shell_above(step) is not None
        found = alone_in(os.environ, socket.gethostname(), read_text, is_shells=is_shells)
    else:
        found = only_one_of(launcher, os.environ, read_text)
    if found is None:
        return
    if found.is_refused:
        raise LaunchError(found.text)
    _note(found.text)


def check_own_place(launcher: Launcher, world_size: int | None) -> None:
    """Check that the place in the world that the environment gives is this process's own.

    Raises:
        LaunchError: if it is that of a rank above this process, or of an interactive shell.
    """
    if not launcher.processes:  # by hand: nothing shows where those processes begin
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
            f"takes {LOGIN_THREADS} cores in all; OMP_NUM_THREADS says otherwise"
            if limited
            else "takes what OMP_NUM_THREADS says"
        )
        _note(
            f"{topology.host} has a batch system and this is no job of it: a login node? This {how}"
        )
    if limited:
        cores = sorted(os.sched_getaffinity(0))
        # The same two for all processes of a world, and others for other users.
        first = LOGIN_THREADS * os.getuid()
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
    from hpctrain.launch.environment import without_rank

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """What a batch system has given to a job.

    Attributes:
        job: the batch system and the job, for messages.
        hosts: its nodes, the one of the job script first; empty where they are not known.
        num_nodes: their number.
        tasks: processes that were asked for; None where it is cores that are counted.
        command: what starts them.
    """

    job: str
    hosts: tuple[str, ...]
    num_nodes: int
    tasks: int | None
    command: str

    @property
    def size(self) -> str:
        """Nodes, or where that is one, tasks."""
        return f"{self.num_nodes} nodes" if self.num_nodes > 1 else f"{self.tasks} tasks"


@dataclass(frozen=True, slots=True)
class Alone:
    """What there is to say of a process that is alone.

    Attributes:
        is_refused: others like it would train alone beside it.
    """

    text: str
    is_refused: bool


def alone_in(
    env: Environment, host: str, read: Callable[[str], str], *, is_shells: bool
) -> Alone | None:
    """Return what is to be said of one process without a launcher; None outside of larger jobs.

    Args:
        env: its environment.
        host: name of its node.
        read: returns the content of a file.
        is_shells: it was started by hand in a shell at a terminal.
    """
    step = env.get("SLURM_STEP_ID")
    found = _allocation(env, read)
    if step is not None:
        return _in_a_step(env, step, found, is_shells=is_shells)
    if found is None:
        return _adopted(read)
    is_many = found.num_nodes > 1 or (found.tasks or 1) > 1
    # On its other nodes a job's list of hosts may not be there to read.
    if _is_elsewhere(env, host, found.hosts) and (is_many or not found.hosts):
        of = f" of {found.size}" if is_many else ""
        return Alone(
            f"this process on {host} was started by none of the launchers that hpctrain knows, in "
            f"{found.job}{of}, and not where its script runs: as by ssh, pbsdsh or blaunch, "
            "which tell nobody of the others. Every process of them would train alone. Start all "
            f"of them from the script: {found.command} python -m hpctrain ...",
            is_refused=True,
        )
    if not is_many:
        return None
    return Alone(
        f"this is one process, and {found.job} has {found.size}. To use them: {found.command} "
        "python -m hpctrain ...",
        is_refused=False,
    )


def only_one_of(launcher: Launcher, env: Environment, read: Callable[[str], str]) -> Alone | None:
    """Return what is to be said of the only process of a launcher; None outside of larger jobs.

    A loop over `aprun -n 1` or `mpirun -np 1` starts many such: each is a run of its own.
    """
    found = _allocation(env, read)
    if found is None or (found.num_nodes < 2 and (found.tasks or 1) < 2):
        return None
    asked = f"{_ASKED.get(launcher.name, 'mpirun -np')} {found.tasks or 'N'}"
    return Alone(
        f"{launcher.label} has started one process, and {found.job} has {found.size}. To use them "
        f"in one run: {asked} python -m hpctrain ...; several of one process each are so many runs",
        is_refused=False,
    )


def _adopted(read: Callable[[str], str]) -> Alone | None:
    """Say of a process that has come by ssh to a node of a job what it is not."""
    adopted = _ADOPTED.search(read(str(PROC / "self" / "cgroup")))
    if adopted is None:
        return None
    return Alone(
        f"this is one process, which has come by ssh into job {adopted[1]} of Slurm; ssh passes "
        "nobody of others. For several in one run: "
        f"srun --jobid={adopted[1]} --overlap -n N python -m hpctrain ...",
        is_refused=False,
    )


def other_hosts(env: Environment) -> list[str]:
    """Return the hosts of this process's step or job but its own; empty where none are known."""
    hosts = expand(env.get("SLURM_STEP_NODELIST", ""))
    if not hosts:
        found = _allocation(env, read_text)
        hosts = () if found is None else found.hosts
    own = {_short(env.get("SLURMD_NODENAME", "")), _short(socket.gethostname())}
    return [host for host in hosts if _short(host) not in own]


def read_text(path: str) -> str:
    """Return the content of a file; empty where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _in_a_step(
    env: Environment, step: str, found: Allocation | None, *, is_shells: bool
) -> Alone | None:
    """Say of a step of one task what a shell in it is not, and of larger jobs what is left."""
    num_nodes = 1 if found is None else found.num_nodes
    if not is_shells and num_nodes < 2:
        return None
    what = "this shell is itself a task" if is_shells else "this process is the one task"
    job = env.get("SLURM_JOB_ID", "?")
    overlap = "" if step == _INTERACTIVE_STEP else "--overlap "
    stale = " ".join(f"-u {name}" for name in _STEP_VARIABLES if name in env)
    return Alone(
        f"{what} of a step of Slurm (job {job}), and one process is started here. For more of "
        f"them: srun {overlap}-n 4 python -m hpctrain ..., or --np 4 on this node; where another "
        f"launcher is to start them, unset the step's variables: env {stale} ...",
        is_refused=False,
    )


def _allocation(env: Environment, read: Callable[[str], str]) -> Allocation | None:
    """Return what the batch system of this process says of its job; None if there is none."""
    if job := env.get("SLURM_JOB_ID"):
        hosts = expand(env.get("SLURM_JOB_NODELIST", ""))
        num_nodes = _count(env, "SLURM_JOB_NUM_NODES") or _count(env, "SLURM_NNODES")
        return Allocation(
            job=f"job {job} of Slurm",
            hosts=hosts,
            num_nodes=num_nodes or max(1, len(hosts)),
            tasks=_count(env, "SLURM_NTASKS"),
            command="srun",
        )
    if job := env.get("PBS_JOBID"):
        lines = tuple(read(env.get("PBS_NODEFILE", "")).split())
        hosts = tuple(dict.fromkeys(lines))
        return Allocation(
            job=f"job {job} of PBS",
            hosts=hosts,
            # Torque gives the number; neither shows every node the list.
            num_nodes=len(hosts) or _count(env, "PBS_NUM_NODES") or 1,
            tasks=len(lines) or None,
            command=f"mpiexec -n {len(lines) or 'N'}",
        )
    if job := env.get("LSB_JOBID"):
        words = env.get("LSB_MCPU_HOSTS", "").split()
        hosts = tuple(words[::2])
        slots = env.get("LSB_DJOB_NUMPROC", "N")
        # Slots are cores: one process may well be meant for many of one node.
        return Allocation(
            job=f"job {job} of LSF",
            hosts=hosts,
            num_nodes=max(1, len(hosts)),
            tasks=None,
            command=f"mpirun -np {slots}, or jsrun -n {slots},",
        )
    if "PE_HOSTFILE" in env and (job := env.get("JOB_ID")):
        rows = read(env["PE_HOSTFILE"]).splitlines()
        hosts = tuple(row.split()[0] for row in rows if row.split())
        return Allocation(
            job=f"job {job} of Grid Engine",
            hosts=hosts,
            num_nodes=max(1, len(hosts)),
            tasks=None,
            command=f"mpirun -np {env.get('NSLOTS', 'N')}",
        )
    return None


def _is_elsewhere(env: Environment, host: str, hosts: Sequence[str]) -> bool:
    """Return whether this process runs where the script of its job does not."""
    # Every task that PBS starts has a number, that of the script is 1, and so has every node, from
    # 0 on; blaunch counts what it starts from 1 on. Source: OpenPBS, start_exec.c; PRRTE, ess/lsf.
    if (_count(env, "PBS_TASKNUM") or 1) > 1 or (_count(env, "PBS_NODENUM") or 0) > 0:
        return True
    if (_count(env, "LSF_PM_TASKID") or 1) > 1:
        return True
    here = _short(host)
    if _short(env.get("SLURMD_NODENAME", "")) == here:
        return False  # by Slurm itself
    names = [_short(name) for name in hosts]
    if here in names:
        return here != names[0]
    # The list may hold names of another network.
    own = [name for name in hosts[:_LOOKED_UP] if _is_of_this_host(name)]
    return bool(own) and own[0] != hosts[0]


def _is_of_this_host(name: str) -> bool:
    """Return whether an address of a name is this host's own: then a socket can be bound to it."""
    with suppress(OSError, UnicodeError):
        for family, kind, protocol, _, address in socket.getaddrinfo(name, 0, type=_DATAGRAMS):
            with suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
                return True
    return False


def expand(text: str) -> tuple[str, ...]:
    """Return the names in a list of Slurm's, such as "n[1-2,07],login"; empty where it is odd."""
    names: list[str] = []
    for part in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", text):
        prefix, bracket, rest = part.partition("[")
        inside, _, suffix = rest.partition("]")
        if "[" in suffix or len(names) > 100_000:
            return ()
        if not bracket:
            names.append(prefix)
            continue
        for item in inside.split(","):
            first, dash, last = item.partition("-")
            if not first.isdecimal() or (dash and not last.isdecimal()):
                return ()
            numbers = range(int(first), int(last or first) + 1)
            names += [f"{prefix}{number:0{len(first)}d}{suffix}" for number in numbers[:100_000]]
    return tuple(names)


def _short(host: str) -> str:
    return host.partition(".")[0]


def _count(env: Environment, variable: str) -> int | None:
    text = env.get(variable, "")
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else None
