"""One process where a batch system has given more: what was forgotten, and what to start instead.

A pure function of the environment. One process of a job of four tasks is often meant, so that it is
told; where several of them would train alone, each as if it were the only one, it is refused.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Environment = Mapping[str, str]

# The shell of salloc, where the site starts it on a node, is a step of its own that gives way.
# Source: SLURM_INTERACTIVE_STEP of Slurm's slurm.h.
_INTERACTIVE_STEP = "4294967290"
_STEP_VARIABLES = ("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """What a batch system has given to a job.

    Attributes:
        job: the batch system and the job, for messages.
        hosts: its nodes, the one of the job script first; empty where they are not told.
        num_nodes: their number.
        tasks: processes that were asked for; None where it is cores that are counted.
        command: what starts them.
    """

    job: str
    hosts: tuple[str, ...]
    num_nodes: int
    tasks: int | None
    command: str


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
    if found is None or (found.num_nodes < 2 and (found.tasks or 1) < 2):
        return None
    size = f"{found.num_nodes} nodes" if found.num_nodes > 1 else f"{found.tasks} tasks"
    if found.num_nodes > 1 and _is_elsewhere(env, host, found.hosts):
        return Alone(
            f"this process on {host} was started by none of the launchers that hpctrain knows, in "
            f"{found.job} of {size}, and not where its script runs: as by ssh, pbsdsh or blaunch, "
            "which tell nobody of the others. Every process of them would train alone. Start all "
            f"of them from the script: {found.command} python -m hpctrain ...",
            is_refused=True,
        )
    return Alone(
        f"this is one process, and {found.job} has {size}. To use them: {found.command} python -m "
        "hpctrain ...",
        is_refused=False,
    )


def other_hosts(env: Environment) -> list[str]:
    """Return the hosts of this process's step or job but its own; empty where they are not told."""
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
    """Return what the batch system of this process tells of its job; None if there is none."""
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
            num_nodes=max(1, len(hosts)),
            tasks=len(lines) or None,
            command=f"mpiexec -n {max(1, len(lines))}",
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
    # Every task that PBS starts has a number; that of the script is 1.
    if (_count(env, "PBS_TASKNUM") or 1) > 1:
        return True
    here = _short(host)
    if _short(env.get("SLURMD_NODENAME", "")) == here:
        return False  # by Slurm itself
    return here in [_short(name) for name in hosts[1:]] and here != _short(hosts[0])


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
