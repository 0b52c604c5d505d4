"""`--np N`: the single-node debug run, under the mpirun that belongs to the bound MPI library."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from hpctrain.errors import LaunchError

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


# What each family speaks, the likeliest first; as `srun --mpi=list` names it.
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
    tell(launch.note)
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
    from hpctrain.launch.mpi import library_family

    srun, mpiexec = shutil.which("srun"), shutil.which("mpiexec")
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


def tell(text: str) -> None:
    """Say on stderr what is started."""
    print(f"hpctrain: {text}", file=sys.stderr, flush=True)  # noqa: T201


def _leave_stdin() -> None:
    """Lead stdin nowhere, and leave it to whom it belongs."""
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, _STDIN)
    os.close(nowhere)


def _ask_for_library() -> tuple[str, str]:
    """Return name and file of the MPI library that mpi4py is bound to."""
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
    from hpctrain.launch.mpi import library_family

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
    folders: list[Path] = []
    if library:
        # PREFIX/lib/libmpi.so; deeper under oneAPI (lib/release) and Debian (lib/ARCH/openmpi/lib).
        places = (Path(library), Path(library).resolve())
        folders = [up / "bin" for place in places for up in place.parents[1:5]]
    paths = [folder / name for folder in folders for name in names]
    paths += [Path(found) for name in names if (found := shutil.which(name))]
    yield from (path for path in dict.fromkeys(paths) if os.access(path, os.X_OK))


def _said(program: str, option: str, environment: dict[str, str] | None = None) -> str:
    """Return what a program prints, to whichever stream; "" if it cannot be run."""
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
