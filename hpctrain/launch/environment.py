"""Who started this process, as which rank of what: by its environment and the processes above.

A launcher's claim is a pure function of the environment, over the table of
`hpctrain.launch.launchers`. It is not believed: where MPI is there, it is compared with MPI's own
world before anything else communicates.

Variables are inherited through any number of launchers; only the process tree shows which of them
is the innermost. What a process is called is an alias there: Open MPI 4 forks its ranks from a
process that bears the name it was called by, such as mpiexec, and sites put scripts of that name
before any launcher. Its executable counts where it can be read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpctrain.errors import LaunchError
from hpctrain.launch.launchers import LAUNCHERS, Launcher
from hpctrain.utils.proc import PROC, executable_of
from hpctrain.utils.proc import ancestors as processes_above

Environment = Mapping[str, str]

# ASCII and short: int() would take other scripts' digits, and refuse the very long.
WHOLE_NUMBER = re.compile(r"\s*[0-9]{1,9}\s*")
# What an interactive shell on a compute node is started by, as a step of one task.
_STEPS = ("srun", "flux", "jsrun", "pals")
# Rank and number of nodes, where each of them is given the same command. Sources: Lightning's
# LightningEnvironment; the documentation of SkyPilot, dstack, HTCondor's parallel universe and AWS
# Batch's multi-node jobs.
_NODES = (
    ("NODE_RANK", "NNODES", "somebody"),
    ("SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES", "SkyPilot"),
    ("DSTACK_NODE_RANK", "DSTACK_NODES_NUM", "dstack"),
    ("_CONDOR_PROCNO", "_CONDOR_NPROCS", "HTCondor"),
    ("AWS_BATCH_JOB_NODE_INDEX", "AWS_BATCH_JOB_NUM_NODES", "AWS Batch"),
)
_STALE = "Are variables of another job still set in this shell?"

_INTERPRETER = re.compile(
    r"(?:python|pypy|perl|ruby|lua|tclsh)[0-9.]*|(?:ba|da|a|k|mk|z|fi|c|tc)?sh[0-9.]*|busybox"
)
_TITLE_LENGTH = 15  # of TASK_COMM_LEN of the kernel's sched.h, less the byte at its end
# Names of links, and of scripts that start a launcher in their turn: they tell nothing.
_COMMAND_OF_LAUNCHER = re.compile(r"(?:mpirun|mpiexec|orterun|prterun|oshrun|shmemrun)\b.*")
# Nix, Guix, Spack and vendors put a script before the real one, which they rename.
_RENAMED = re.compile(r"(?:[-_.](?:wrapped|real|bin|exe|orig))+_?$")

# Of the process managers' own protocols; the table has those that hpctrain reads.
_PREFIXES = ("PMI_", "PMI2_", "PMIX_", "OMPI_", "PRTE_", "PALS_", "JSM_", "MV2_", "HYDI_")


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a launcher says about this process; None is a value that it does not tell.

    Attributes:
        launcher: the row of the table; None: no launcher, this is one process.
        reasons: the variable behind each value.
    """

    launcher: Launcher | None
    rank: int | None
    world_size: int | None
    local_rank: int | None = None
    local_world_size: int | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def needs_mpi(self) -> bool:
        return self.launcher is not None and bool(self.launcher.mpi_families)


def this_process() -> Claim:
    """Return what the innermost launcher of this process claims.

    Raises:
        LaunchError: if its variables are incomplete, impossible, or those of two launchers.
    """
    return detect(os.environ, ancestors())


def detect(env: Environment, above: Sequence[str] = ()) -> Claim:
    """Return what the innermost launcher claims.

    Args:
        env: the environment of the process.
        above: names of the processes above it, the nearest first, where they are known.

    Raises:
        LaunchError: if its variables are incomplete, impossible, or those of two launchers that
            disagree; `everywhere` where all processes of the job have to find the same.
    """
    launchers = launchers_in(env)
    if not launchers:
        _refuse_half_a_world(env)
        return _one_process("no launcher in the environment")
    inner = nearest(launchers, above) or launchers[0]
    claim = _claim(inner, env)
    if inner.name in _STEPS and claim.world_size == 1:
        _refuse_a_larger_world_in_a_step(claim, [_claim(row, env) for row in launchers], env)
    if inner.name == "srun" and claim.world_size == 1:
        # So does every shell of `srun --pty` look, and what is started in it by hand.
        return _one_process("a Slurm step of one task")
    for other in launchers:
        if other is not inner and not _is_outside(other, inner, above):
            _compare(claim, _claim(other, env), env)
    if not claim.needs_mpi:
        if claim.world_size == 1 and "MASTER_ADDR" not in env:
            return _one_process(claim.reasons["world_size"])
        _check_meeting_point(claim, env)
    return claim


def launchers_in(env: Environment) -> list[Launcher]:
    """Return the launchers whose variables are set, the likeliest innermost one first."""
    found: dict[str, Launcher] = {}
    for launcher in LAUNCHERS:
        if all(marker in env for marker in launcher.markers):
            # A later row on the same rank variable is the same launcher, seen less closely.
            found.setdefault(launcher.rank[0], launcher)
    return list(found.values())


def nearest(launchers: Sequence[Launcher], above: Sequence[str]) -> Launcher | None:
    """Return the launcher whose process is the nearest one above; None if none is seen."""
    for name in above:
        for launcher in launchers:
            if name in launcher.processes:
                return launcher
    return None


def _is_outside(other: Launcher, inner: Launcher, above: Sequence[str]) -> bool:
    """Return whether the inner launcher may have been started under the other one.

    Then the other's variables are its own business, and need not agree.
    """
    if not inner.processes.isdisjoint(above):
        # Daemons need not be above what they were asked to start; torchrun's agent is. RANK set by
        # hand, or by Kubeflow for a pod, has no process at all.
        return bool(other.processes) and (
            other.name != "torchrun" or not other.processes.isdisjoint(above)
        )
    # Every launcher speaks PMI or PMIx, srun's variables are in all that a batch job starts, and
    # one torchrun a node is started by whatever launcher there is.
    return other.name in ("pmi", "prrte", "srun") or inner.name == "torchrun"


def _compare(claim: Claim, other: Claim, env: Environment) -> None:
    """Refuse two launchers that disagree: one of them has another job's world, or half of one."""
    assert claim.launcher is not None
    assert other.launcher is not None
    for name in ("rank", "world_size"):
        ours, theirs = getattr(claim, name), getattr(other, name)
        if None not in (ours, theirs) and ours != theirs:
            raise LaunchError(
                f"two launchers disagree: {claim.launcher.label} says {claim.reasons[name]}, "
                f"{other.launcher.label} {other.reasons[name]}. If the second is left over from "
                f"another job, start with: env {_unset(other.launcher, env)} ...",
                everywhere=True,
            )


def _refuse_a_larger_world_in_a_step(
    claim: Claim, others: Sequence[Claim], env: Environment
) -> None:
    """Refuse to be one process where another launcher says that this is one of several.

    A step of one task is what every interactive shell on a node is. What is started in there by a
    launcher that the process tree does not tell would be so many runs of one process each.
    """
    assert claim.launcher is not None
    for other in others:
        assert other.launcher is not None
        if not (other.world_size or 1) > 1 and not (other.rank or 0) > 0:
            continue
        theirs = "world_size" if "world_size" in other.reasons else "rank"
        raise LaunchError(
            f"two launchers disagree: {claim.launcher.label} has a step of one task here "
            f"({claim.reasons['world_size']}), {other.launcher.label} a world of several "
            f"({other.reasons[theirs]}). If this process is one of those several, start it with: "
            f"env {_unset(claim.launcher, env)} ...; if they are left over from another job: env "
            f"{_unset(other.launcher, env)} ...",
            everywhere=True,
        )


def _unset(launcher: Launcher, env: Environment) -> str:
    """Return options of `env` that take a launcher's variables out of the environment."""
    return " ".join(f"-u {variable}" for variable in launcher.markers if variable in env)


def _refuse_half_a_world(env: Environment) -> None:
    """Refuse variables that tell of a world, but not of this process's place in it."""
    if env.get("PET_NNODES", "1") != "1":
        raise LaunchError(
            f"PET_NNODES={env['PET_NNODES']} is set, RANK is not: Kubeflow's Trainer means these "
            "pods for torchrun. Start them as: torchrun -m hpctrain ...",
            everywhere=True,
        )
    if "NODE_RANK" in env and "WORLD_SIZE" in env:
        raise LaunchError(
            f"NODE_RANK={env['NODE_RANK']} and WORLD_SIZE={env['WORLD_SIZE']} are set, RANK is "
            "not: where WORLD_SIZE counts nodes, the rank of a process is unknown. Set RANK and "
            "WORLD_SIZE for every process (WORLD_SIZE = nodes x processes per node), or start "
            "with torchrun --nnodes ... --node-rank $NODE_RANK.",
            everywhere=True,
        )
    for rank, count, meaning in _NODES:
        # A count of one node is no world; without a count only whoever set it knows.
        if rank in env and "WORLD_SIZE" not in env and "RANK" not in env:
            if env.get(count, "") == "1" or (rank == "NODE_RANK" and "MASTER_ADDR" not in env):
                continue
            raise LaunchError(
                f"{rank}={env[rank]} is set, RANK and WORLD_SIZE are not: {meaning} has started "
                "this on several nodes, and every process would train alone. Start it on each "
                f"with: torchrun --nnodes N --node-rank ${rank} --master-addr ... -m hpctrain ...; "
                f"for one process: env -u {rank} ...",
                everywhere=True,
            )
    if "RANK" in env or "WORLD_SIZE" in env:
        there, missing = ("RANK", "WORLD_SIZE") if "RANK" in env else ("WORLD_SIZE", "RANK")
        raise LaunchError(
            f"{there}={env[there]} is set, {missing} is not. Set both for every process, or "
            f"unset {there} to train in one process.",
            everywhere=True,
        )


def _one_process(reason: str) -> Claim:
    return Claim(
        launcher=None,
        rank=0,
        world_size=1,
        local_rank=0,
        local_world_size=1,
        reasons={"rank": reason, "world_size": reason},
    )


def _claim(launcher: Launcher, env: Environment) -> Claim:
    """Return what one launcher claims, checked against itself."""
    values: dict[str, int | None] = {}
    reasons: dict[str, str] = {}
    for name in ("rank", "world_size", "local_rank", "local_world_size"):
        variable = next((key for key in getattr(launcher, name) if key in env), None)
        values[name] = None if variable is None else _number(launcher, env, variable)
        if variable is not None:
            reasons[name] = f"{variable}={env[variable]}"
    rank, world_size = values["rank"], values["world_size"]
    if rank is None or (world_size is None and launcher.sets_size):
        missing = launcher.rank[0] if rank is None else launcher.world_size[0]
        raise LaunchError(
            f"{launcher.label} started this process, but {missing} is not set.", everywhere=True
        )
    for part, whole in (("rank", "world_size"), ("local_rank", "local_world_size")):
        inner, outer = values[part], values[whole]
        if outer is not None and (outer < 1 or (inner is not None and inner >= outer)):
            raise LaunchError(
                f"{launcher.label} started this process, but {reasons.get(part, part)} and "
                f"{reasons[whole]} contradict each other: {part} has to be below {whole}. {_STALE}",
                # The first rank that is too high reports those above it.
                everywhere=part == "rank" and rank > outer,
            )
    per_pod = env.get("PET_NPROC_PER_NODE", "1")
    if launcher.name == "kubeflow" and per_pod.isdecimal() and per_pod != "1":
        raise LaunchError(
            f"{launcher.label} means {per_pod} processes a pod (PET_NPROC_PER_NODE): RANK is that "
            "of the pod. Start them as: torchrun -m hpctrain ...",
            everywhere=True,
        )
    return Claim(
        launcher=launcher,
        rank=rank,
        world_size=world_size,
        local_rank=values["local_rank"],
        local_world_size=values["local_world_size"],
        reasons=reasons,
    )


def _check_meeting_point(claim: Claim, env: Environment) -> None:
    """Check MASTER_ADDR and MASTER_PORT, where a world without MPI meets."""
    assert claim.launcher is not None
    for variable in ("MASTER_ADDR", "MASTER_PORT"):
        if not env.get(variable):
            raise LaunchError(
                f"{claim.launcher.label} makes a world of {claim.world_size} processes, but "
                f"{variable} is not set. Set it to the address or port of rank 0, the same for "
                "every process.",
                everywhere=True,
            )
    port = env["MASTER_PORT"]
    if not (WHOLE_NUMBER.fullmatch(port) and 0 < int(port) < 65536):
        raise LaunchError(
            f"MASTER_PORT={port!r} is not a port: it has to be 1 to 65535.", everywhere=True
        )


def _number(launcher: Launcher, env: Environment, variable: str) -> int:
    text = env[variable]
    if not WHOLE_NUMBER.fullmatch(text):
        raise LaunchError(
            f"{launcher.label} started this process, but {variable}={text!r} is not a whole "
            f"number from 0. {_STALE}",
            # What all processes share rank 0 reports.
            everywhere=variable in launcher.world_size,
        )
    return int(text)


def ancestors(process: int | None = None, proc: Path = PROC) -> tuple[str, ...]:
    """Return the names of the processes above one (this one), the nearest first.

    An executable is followed by what the process calls itself, if that is another name, and by what
    it runs if it is an interpreter: a script, or the module of `python -m`.
    Empty where the system does not say: not Linux, or above the first process of a container.
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
    others = [
        other
        for other in others
        if not _COMMAND_OF_LAUNCHER.fullmatch(other) and not _is_interpreter(other)
    ]
    return list(dict.fromkeys([_plain(name), *others]))


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


def without_rank(env: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which MPI, torch and hpctrain find no world to be part of."""
    told = {
        variable
        for row in LAUNCHERS
        for variables in (
            row.markers,
            row.rank,
            row.world_size,
            row.local_rank,
            row.local_world_size,
            row.foreign,
        )
        for variable in variables
    }
    return {
        name: value
        for name, value in env.items()
        if name not in told and not name.startswith(_PREFIXES)
    }
