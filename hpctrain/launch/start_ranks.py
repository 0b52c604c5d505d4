"""Starting ranks from one command: `--np N` under the mpirun of the bound MPI, or torch's agents.

The first is the single-node debug run. torch's elastic agent, one a node, serves where several
nodes have no launcher, as on clouds whose guides set MASTER_ADDR and NODE_RANK on each, and on one
node without an MPI; its ranks are a world of torchrun.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from hpctrain.errors import LaunchError, UsageError
from hpctrain.launch.environment import WHOLE_NUMBER
from hpctrain.utils.proc import allowed_cores

_INSTALL = (
    "Install an embedded MPI (pip install 'hpctrain[mpich]'), or load the site's MPI module and "
    "its mpi4py."
)
# In a process of its own: this one is about to become mpirun, and never loads MPI.
_ASK = "import json, hpctrain.launch.mpi as m; print(json.dumps(m.bound_library()))"
_ASK_SECONDS = 60.0
_STDIN = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Starter:
    """How one kind of mpirun starts ranks on this node, and on this node only.

    Attributes:
        says: words that `mpirun --version` prints.
        families: families of MPI libraries whose ranks it starts.
        names: what it may be called.
        options: for ranks that share cores, in a batch job too, whose nodes it would take.
        environment: the same, where there is no option.
    """

    says: str
    families: frozenset[str]
    names: tuple[str, ...]
    options: tuple[str, ...]
    root_options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


# Pinning is off: by default Open MPI and Intel MPI give each rank one core, and the loader's
# threads with it.
_NO_SCHEDULER = "^slurm,tm,pbs,lsf,gridengine,flux"
STARTERS = (
    Starter(
        says="Open MPI",
        families=frozenset({"openmpi", "spectrum"}),
        names=("mpirun", "mpirun.openmpi"),
        options=("--oversubscribe", "--bind-to", "none"),
        root_options=("--allow-run-as-root",),
        environment={"PRTE_MCA_ras": _NO_SCHEDULER, "OMPI_MCA_ras": _NO_SCHEDULER},
    ),
    Starter(
        says="Intel(R) MPI",
        families=frozenset({"intel", "mpich", "mvapich"}),
        names=("mpirun", "mpiexec.hydra"),
        options=("-bootstrap", "fork", "-hosts", "localhost"),
        environment={"I_MPI_PIN": "0"},
    ),
    Starter(
        says="HYDRA",
        families=frozenset({"mpich", "mvapich", "intel"}),
        names=("mpirun", "mpirun.mpich", "mpiexec.hydra"),
        options=("-launcher", "fork", "-hosts", "localhost"),
    ),
)


# The protocols of each family, the likeliest first; as `srun --mpi=list` names it.
_MPI_OF_SRUN = {
    "cray": ("cray_shasta", "pmi2"),
    "openmpi": ("pmix",),
    "spectrum": ("pmix",),
}
# On the node that this is typed on, also where the shell itself is a step and holds the cores.
_SRUN_OPTIONS = (
    *("--overlap", "--nodes=1", "--overcommit", "--cpu-bind=none"),
    *("--input=none", "--kill-on-bad-exit=1"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What starts the ranks of one node.

    Attributes:
        program: to run.
        arguments: its own name first; the command of the ranks follows.
        environment: for it.
        note: what to say of it.
    """

    program: str
    arguments: Sequence[str]
    environment: Mapping[str, str]
    note: str


def start(num_processes: int, command: Sequence[str]) -> NoReturn:
    """Replace this process by an mpirun of `command` on this node.

    Raises:
        LaunchError: if there is no MPI library, or nothing that starts its ranks.
    """
    become(find_launch(num_processes), command)


def become(launch: Launch, command: Sequence[str]) -> NoReturn:
    """Replace this process by what starts `command` as ranks on this node.

    Its signals and its exit code are the launcher's from here on.
    """
    report(launch.note)
    # mpirun would take the lines of a loop around it for its first rank.
    _leave_stdin()
    os.execve(launch.program, [*launch.arguments, *command], dict(launch.environment))


def find_launch(num_processes: int) -> Launch:
    """Return what starts ranks on this node: the mpirun of the bound MPI library.

    In a job without an mpirun that fits, the batch system's own launcher serves.

    Raises:
        LaunchError: if there is no MPI library, or nothing that starts its ranks.
    """
    version, library = _ask_for_library()
    try:
        mpirun, starter = _find(version, library)
    except LaunchError as error:
        launcher = _of_the_batch_system(num_processes, version)
        if launcher is None:
            raise
        return Launch(
            program=launcher[0],
            arguments=launcher,
            environment=dict(os.environ),
            note=f"{num_processes} processes under {' '.join(launcher)}, for: {error}",
        )
    options = [*starter.options, *(starter.root_options if os.geteuid() == 0 else ())]
    return Launch(
        program=str(mpirun),
        arguments=[str(mpirun), *options, "-np", str(num_processes)],
        environment=_environment(mpirun, starter.environment),
        note=f"{num_processes} processes under {mpirun}",
    )


def _of_the_batch_system(num_processes: int, version: str) -> list[str] | None:
    """Return how the batch system of this job starts ranks on one node; None outside of jobs."""
    from shutil import which

    from hpctrain.launch.launchers import library_family

    srun, mpiexec = which("srun"), which("mpiexec")
    if os.environ.get("SLURM_JOB_ID") and srun is not None:
        options = [*_SRUN_OPTIONS, f"--ntasks={num_processes}"]
        options.append(f"--ntasks-per-node={num_processes}")
        # Under salloc, on a login node, Slurm chooses one.
        if node := os.environ.get("SLURMD_NODENAME"):
            options.append(f"--nodelist={node}")
        wanted = _MPI_OF_SRUN.get(library_family(version), ("pmi2",))
        there = _said(srun, "--mpi=list")
        kind = next((kind for kind in wanted if kind in there.split()), None)
        if kind is not None and "SLURM_MPI_TYPE" not in os.environ:
            options.append(f"--mpi={kind}")
        return [srun, *options]
    if os.environ.get("PBS_JOBID") and mpiexec is not None:
        said = _said(mpiexec, "--version")
        if not any(starter.says in said for starter in STARTERS):  # those are another MPI's
            return [mpiexec, "-n", str(num_processes)]
    return None


def report(text: str) -> None:
    """Say on stderr what is started."""
    print(f"hpctrain: {text}", file=sys.stderr, flush=True)  # noqa: T201


def _leave_stdin() -> None:
    """Lead stdin nowhere, and leave it to whom it belongs."""
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, _STDIN)
    os.close(nowhere)


def _ask_for_library() -> tuple[str, str]:
    """Return name and file of the MPI library that mpi4py is bound to."""
    import subprocess  # every command imports this module, and few start anything

    try:
        answer = subprocess.run(
            [sys.executable, "-c", _ASK],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_ASK_SECONDS,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
        raise LaunchError(f"mpi4py cannot load an MPI library ({last}). {_INSTALL}") from error
    except subprocess.TimeoutExpired as error:
        raise LaunchError(
            f"mpi4py did not load its MPI library within {_ASK_SECONDS:.0f} s."
        ) from error
    name, library = json.loads(answer.stdout.splitlines()[-1])
    return str(name), str(library)


def _find(version: str, library: str) -> tuple[Path, Starter]:
    """Return the mpirun that belongs to a library: the one beside it, else one on PATH."""
    from hpctrain.launch.launchers import library_family

    family = library_family(version)
    starters = [starter for starter in STARTERS if family in starter.families]
    tried = []
    for mpirun in _candidates(library, [name for row in starters for name in row.names]):
        said = _said(str(mpirun), "--version", _environment(mpirun, {}))
        for starter in starters:
            if starter.says in said:
                return mpirun, starter
        tried.append(str(mpirun))
    others = f" ({', '.join(tried)} is another MPI's)" if tried else ""
    raise LaunchError(
        f"mpi4py is bound to {version} ({library or 'file unknown'}), but no mpirun of it is "
        f"beside it or on PATH{others}. {_INSTALL}"
    )


def _candidates(library: str, names: Sequence[str]) -> Iterator[Path]:
    """Yield the files that may be the library's mpirun, the likeliest first."""
    from shutil import which

    folders: list[Path] = []
    if library:
        # PREFIX/lib/libmpi.so; deeper under oneAPI (lib/release) and Debian (lib/ARCH/openmpi/lib).
        places = (Path(library), Path(library).resolve())
        folders = [up / "bin" for place in places for up in place.parents[1:5]]
    paths = [folder / name for folder in folders for name in names]
    paths += [Path(found) for name in names if (found := which(name))]
    yield from (path for path in dict.fromkeys(paths) if os.access(path, os.X_OK))


def _said(program: str, option: str, environment: dict[str, str] | None = None) -> str:
    """Return what a program prints, to whichever stream; "" if it cannot be run."""
    import subprocess

    try:
        return subprocess.run(
            [program, option],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_ASK_SECONDS,
            check=False,
            env=environment,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _environment(mpirun: Path, defaults: dict[str, str]) -> dict[str, str]:
    """Return our environment with mpirun's folder first: Intel's looks for its parts on PATH."""
    path = f"{mpirun.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {**defaults, **os.environ, "PATH": path}


PORT = 29400
"""Where the agents meet if nothing else is said, as Fabric's do."""

_MOST_NODES = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """One command a node: how many of them, which one this is, and where they meet."""

    count: int
    rank: int
    address: str
    port: int = PORT


def nodes_of(
    env: Mapping[str, str],
    *,
    count: int | None = None,
    rank: int | None = None,
    address: str | None = None,
    port: int | None = None,
) -> Nodes | None:
    """Return the nodes that a command line and the environment name; None: this one alone.

    What is given stands before NODE_RANK, WORLD_SIZE, which counts nodes only here, MASTER_ADDR and
    MASTER_PORT.

    Raises:
        UsageError: if something is missing, or does not fit.
    """
    if rank is None and count is None and ("NODE_RANK" not in env or "RANK" in env):
        return None
    sizes = [name for name in ("NNODES", "WORLD_SIZE") if name in env]
    if count is None:
        if not sizes:
            raise _missing("--num-nodes N", "WORLD_SIZE or NNODES, the number of nodes")
        count = _number(env, sizes[0])
    if count == 1:
        return None
    if rank is None:
        if "NODE_RANK" not in env:
            raise _missing("--node-rank R", "NODE_RANK, from 0 on")
        rank = _number(env, "NODE_RANK")
    if not 0 <= rank < count <= _MOST_NODES:
        raise UsageError(
            f"node rank {rank} of {count} nodes: node ranks are 0 to {count - 1}", everywhere=True
        )
    address = address or env.get("MASTER_ADDR")
    if not address:
        raise _missing("--main-address A", "MASTER_ADDR, the address of node 0")
    if port is None:
        port = _number(env, "MASTER_PORT") if env.get("MASTER_PORT") else PORT
    if not 0 < port < 65536:
        raise UsageError(f"port {port}: ports are 1 to 65535", everywhere=True)
    return Nodes(count=count, rank=rank, address=address, port=port)


def start_over_nodes(nodes: Nodes, num_processes: int, words: Sequence[str]) -> NoReturn:
    """Become this node's agent, which starts `num_processes` of `python WORDS` in one world."""
    _become(
        num_processes,
        [
            *(f"--nnodes={nodes.count}", f"--node-rank={nodes.rank}"),
            *(f"--master-addr={nodes.address}", f"--master-port={nodes.port}"),
        ],
        words,
    )


def start_on_this_node(num_processes: int, words: Sequence[str]) -> NoReturn:
    """Become an agent that starts `num_processes` of `python WORDS`, a world of their own."""
    _become(num_processes, ["--standalone"], words)


def command_here(num_processes: int, words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the command of such an agent, and its environment."""
    return _command(num_processes, ["--standalone"], words)


def _become(num_processes: int, options: Sequence[str], words: Sequence[str]) -> NoReturn:
    command, environment = _command(num_processes, options, words)
    os.execve(command[0], command, environment)


def _command(
    num_processes: int, options: Sequence[str], words: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", *options),
        *(f"--nproc-per-node={num_processes}", "--no-python", sys.executable, *words),
    ]
    environment = dict(os.environ)
    for variable in ("NODE_RANK", "WORLD_SIZE"):  # of nodes, which ranks would take for theirs
        environment.pop(variable, None)
    # The agent would set 1, and warn of it.
    cores = len(allowed_cores())
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_processes)))
    return command, environment


def _number(env: Mapping[str, str], variable: str) -> int:
    text = env[variable]
    if not WHOLE_NUMBER.fullmatch(text):
        raise UsageError(f"{variable}={text!r} is not a whole number from 0", everywhere=True)
    return int(text)


def _missing(option: str, variable: str) -> UsageError:
    return UsageError(
        f"for several nodes {option} is needed, or in the environment {variable}", everywhere=True
    )
