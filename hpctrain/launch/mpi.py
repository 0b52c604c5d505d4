"""MPI: its library, MPI_Init and what may go wrong in it, its world. The only importer of mpi4py.

Where a library cannot speak to the process manager, or finds no shared memory, MPI_Init aborts or
waits for ever, and leaves no room for a message of ours: so both are checked before.

A library that finds its ranks on one machine maps each other's memory, by process id (CMA) or
through /dev/shm. A container of its own for every rank splits process ids, and maybe /dev/shm:
MPICH 5 fails in its first large message then, or hangs in MPI_Init; Open MPI 5 crashes.

/dev/shm was measured on tmpfs of 1 to 90 MiB with 1 to 16 ranks of a node, each of which sent and
received messages of up to 32 MB:

- MPICH 5.0.2 (ch4:ucx) ends by a bus error in MPI_Init with up to 1 MiB a rank. Below 16 MiB it
  does without shared memory then; from there on UCX takes 5.15 MiB a rank, at first 16 MiB at once,
  and ends by a segmentation fault where they are not there. Where /dev/shm is read-only it ends by
  a UCX error. All of this holds for one rank too. So the 64 MiB of a container serve 12 ranks.
- Intel MPI 2021.18 takes up to 8 MiB for 2 to 12 ranks, most of it as messages grow; one rank none.
- Open MPI 5.0.11 does without.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import os
import socket
import stat
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from hpctrain.errors import ExitCode, LaunchError
from hpctrain.launch.communicators import MPICommunicator
from hpctrain.launch.environment import Claim, Environment, ancestors, this_process
from hpctrain.launch.launchers import Launcher, library_family, library_name
from hpctrain.launch.reporter import IN_MPI_INIT, marked, missing_ranks_message, ranks_of_node
from hpctrain.launch.waiting import ended_from_outside, limit_seconds
from hpctrain.topology import closing_together
from hpctrain.utils.text import plural, size

# MPI carries control messages from host memory only. A GPU-aware MPI would open the device at
# MPI_Init, before the rank has chosen its own.
HOST_ONLY = {"MPICH_GPU_SUPPORT_ENABLED": "0", "MPIR_CVAR_ENABLE_GPU": "0", "I_MPI_OFFLOAD": "0"}

_PMIX_OF_SLURM = "slurm.pmix."

# Messages between ranks of one machine through the network layer; only control messages are MPI's.
# Intel MPI needs nothing, but always a /dev/shm that its ranks share.
WITHOUT_SHARED_MEMORY = {"MPIR_CVAR_NOLOCAL": "1", "OMPI_MCA_btl": "^sm,vader"}

# Source: PROC_PID_INIT_INO of the Linux kernel's include/linux/proc_ns.h.
_FIRST_PID_NAMESPACE = "pid:[4026531836]"

# By then the first rank to report has ended the job, where anything can.
_HEAD_START_SECONDS = 5.0
# The thread that watches needs the interpreter; this does not.
_BACKSTOP_SECONDS = 60.0

_SHARED = Path("/dev/shm")
_MPICH_LEAST_BYTES_PER_RANK = 2**20
_UCX_FROM_BYTES = 16 * 2**20
_UCX_BYTES_PER_RANK = 5.25 * 2**20
_INTEL_BYTES = 6 * 2**20
_INTEL_BYTES_PER_RANK = 2**18
_FIX = (
    "Give the container more (docker run --shm-size=8g or --ipc=host, in Kubernetes an emptyDir "
    "with medium: Memory at /dev/shm), or remove what dead jobs have left there."
)


@contextmanager
def mpi_world(claim: Claim, *, keep: bool = False) -> Iterator[MPICommunicator]:
    """Initialise MPI and give the communicator of the world that the launcher claims.

    Collective: all ranks. MPI is finalized only where the body succeeds: after a failure the
    others may be anywhere, and MPI_Finalize would wait for them. Where somebody else has
    initialised MPI in this process, it is joined, and theirs to finalize.

    Args:
        claim: what the launcher says of this process.
        keep: leave MPI up until the interpreter's exit, for further worlds of this process; an
            exception that comes to the top in between ends all ranks.

    Raises:
        LaunchError: if the bound library cannot join the launcher's world, or sees another one, or
            has been finalized in this process.
    """
    assert claim.launcher is not None
    for variable, value in HOST_ONLY.items():
        os.environ.setdefault(variable, value)
    if is_walled_off(claim.launcher, ancestors()):
        for variable, value in WITHOUT_SHARED_MEMORY.items():
            os.environ.setdefault(variable, value)
    for variable in claim.launcher.foreign:
        os.environ.pop(variable, None)
    try:
        MPI = _load()  # noqa: N806
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"{claim.launcher.label} started this process, but mpi4py cannot load an MPI library: "
            f"{error}. {_sentence(claim.launcher.fix)}"
        ) from error

    version = MPI.Get_library_version()
    library = library_name(version)
    _check_library(claim, library)
    if not MPI.Is_initialized():
        check_process_manager(claim.launcher, os.environ, version)
        check_descriptor(claim.launcher, os.environ)
    if MPI.Is_finalized():
        raise LaunchError(
            f"{library} has been finalized in this process, and cannot be started again: MPI runs "
            "once a process. Call hpctrain.connect() once, and before anything that finalizes MPI.",
            everywhere=True,
        )
    is_ours = not MPI.Is_initialized()
    if is_ours:
        check_shared_memory(claim, library_family(version), library)
        initialize(MPI, claim)
    _check_world(claim, library, MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size())
    communicator = MPICommunicator(MPI.COMM_WORLD, library)
    is_alone = communicator.world_size == 1
    # Alone it is not collective, and so can wait until nobody may want to connect again.
    stays = is_ours and (is_alone or keep)
    if stays:
        atexit.register(_finalize, MPI)
    if stays and not is_alone:
        _abort_if_uncaught()
    finalize = is_ours and not stays
    with closing_together(communicator, MPI.Finalize if finalize else communicator.free):
        yield communicator


def _abort_if_uncaught() -> None:
    """Have an exception at the top of this rank end all: the others wait where it will not come."""
    previous = sys.excepthook

    def uncaught(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        previous(kind, error, trace)
        sys.stderr.flush()
        abort(ExitCode.BUG)

    sys.excepthook = uncaught


def _finalize(MPI: Any) -> None:  # noqa: N803 - mpi4py's name
    """Finalize MPI at the end of this process, unless somebody has."""
    if not MPI.Is_finalized():
        MPI.Finalize()


@contextmanager
def mpi_part(given: Any) -> Iterator[MPICommunicator]:
    """Give the control plane over a communicator of mpi4py's. Collective: its ranks.

    MPI stays as it is: whoever has made the communicator has initialised it, and finalizes it.

    Raises:
        LaunchError: if it is no communicator of this process's group.
    """
    MPI = sys.modules.get("mpi4py.MPI")  # noqa: N806
    if MPI is None or not isinstance(given, MPI.Intracomm) or given == MPI.COMM_NULL:
        is_null = MPI is not None and isinstance(given, MPI.Comm)
        raise LaunchError(
            "communicator is MPI.COMM_NULL, or between two groups: call connect() on its own ranks "
            "only, with a communicator of them alone"
            if is_null
            else f"communicator is a {type(given).__name__}, not a communicator of mpi4py, such as "
            "MPI.COMM_WORLD.Split(color)"
        )
    communicator = MPICommunicator(given, library_name(MPI.Get_library_version()))
    with closing_together(communicator, communicator.free):
        yield communicator


def claim_of_part(part: MPICommunicator) -> Claim:
    """Return what is known of this process in a communicator that it was given."""
    given = "the communicator that connect() was given"
    try:
        launcher = this_process().launcher
    except LaunchError:  # of a world that is not ours to judge
        launcher = None
    return Claim(
        launcher=launcher,
        rank=part.rank,
        world_size=part.world_size,
        reasons={"rank": given, "world_size": given},
    )


def bound_library() -> tuple[str, str]:
    """Return name and file of the library that mpi4py is bound to; the file is "" if unknown.

    Loads the library into this process, but does not initialise it.
    """
    MPI = _load()  # noqa: N806
    maps = Path("/proc/self/maps")
    lines = maps.read_text(encoding="utf-8").splitlines() if maps.exists() else []
    files = [line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6]
    mapped = [file for file in files if Path(file).name.startswith("libmpi")]
    return library_name(MPI.Get_library_version()), mapped[0] if mapped else ""


def _load() -> Any:
    """Import mpi4py without letting it initialise MPI, now or at exit."""
    import mpi4py

    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = False
    from mpi4py import MPI

    return MPI


def _check_library(claim: Claim, library: str) -> None:
    """Compare library and launcher before MPI_Init, which aborts where they do not fit."""
    assert claim.launcher is not None
    family = library_family(library)
    if family != "unknown" and family not in claim.launcher.mpi_families:
        raise LaunchError(
            f"{claim.launcher.label} started this process, but mpi4py is bound to {library}, "
            f"which cannot join its world. {_sentence(claim.launcher.fix)}",
            everywhere=True,
        )


def _check_world(claim: Claim, library: str, rank: int, world_size: int) -> None:
    """Compare MPI's world with the claim: a job must never fall apart into solo runs."""
    assert claim.launcher is not None
    claimed_size = claim.world_size
    if claimed_size is None:
        # A world is at least as large as the launcher says that its part on this node is.
        claimed_size = max(world_size, claim.local_world_size or 1)
    if (rank, world_size) != (claim.rank, claimed_size):
        claimed = ", ".join(
            claim.reasons[key]
            for key in ("rank", "world_size", "local_world_size")
            if key in claim.reasons
        )
        raise LaunchError(
            f"{claim.launcher.label} claims rank {claim.rank} of {claimed_size} ({claimed}), but "
            f"{library} sees rank {rank} of {world_size}. {_sentence(claim.launcher.fix)}",
            everywhere=True,
        )


def _sentence(fix: str) -> str:
    return f"{fix[:1].upper()}{fix[1:]}."


def abort(code: int) -> None:
    """End all ranks of the job through MPI, if it runs. Not collective."""
    MPI = sys.modules.get("mpi4py.MPI")  # noqa: N806
    if MPI is not None and MPI.Is_initialized() and not MPI.Is_finalized():
        MPI.COMM_WORLD.Abort(code)


def check_process_manager(launcher: Launcher, env: Environment, version: str) -> None:
    """Check that the variables of the process manager are this process's and the library's own.

    Args:
        launcher: what started this process.
        env: its environment.
        version: all that MPI_Get_library_version says.

    Raises:
        LaunchError: if they are another step's, or of a kind that the library cannot speak.
    """
    if launcher.name == "srun":
        _check_step(env)
    # MPICH says how it was built; what is derived from it does not.
    built = next((line for line in version.splitlines() if "MPICH configure" in line), None)
    if built is not None and "pmix" not in built and "PMIX_RANK" in env and "PMI_RANK" not in env:
        raise LaunchError(
            f"{launcher.label} speaks PMIx to this process, and the MPICH that mpi4py is bound to "
            "was built without. Start it as srun --mpi=pmi2, or bind mpi4py to an MPI that speaks "
            "PMIx: the site's module, or MPI4PY_LIBMPI=/path/to/libmpi.so.",
            everywhere=True,
        )


def check_descriptor(launcher: Launcher, env: Environment) -> None:
    """Check that the connection to the process manager is there: a rank's children have none.

    Python closes it in what it starts, and MPI_Init would write into whatever has its number now.

    Raises:
        LaunchError: if it is not.
    """
    text = env.get("PMI_FD", "")
    speaks_pmi = launcher.rank[0] == "PMI_RANK" or launcher.name == "srun"
    if not speaks_pmi or "PMIX_RANK" in env or not text.isdecimal():
        return
    try:
        if stat.S_ISSOCK(os.fstat(int(text)).st_mode):
            return
        what = "is something else here"
    except OSError:
        what = "is closed here"
    raise LaunchError(
        f"PMI_FD={text}, the connection to the process manager, {what}: the variables of a rank "
        "were inherited by a process that is none. Start it without them: env -u PMI_FD "
        "-u PMI_RANK -u PMI_SIZE ..."
    )


def _check_step(env: Environment) -> None:
    """Compare the step that the process manager names with the one that this process is in.

    sbatch hands the whole environment on: a job that is submitted by a rank has that rank's
    SLURM_STEP_ and PMI variables in its script, and in every step but for what srun overwrites.
    """
    namespace = env.get("PMIX_NAMESPACE", "")
    named = {
        "PMI_JOBID": env.get("PMI_JOBID"),
        "PMIX_NAMESPACE": namespace if namespace.startswith(_PMIX_OF_SLURM) else None,
    }
    job, step = env.get("SLURM_JOB_ID"), env["SLURM_STEP_ID"]
    given = {
        variable: value.removeprefix(_PMIX_OF_SLURM)
        for variable, value in named.items()
        if value is not None
    }
    # Cray's plugin names the job alone; the parts of a heterogeneous job have several ids.
    ours = (job, f"{job}.{step}")
    if (
        job is None
        or "SLURM_HET_SIZE" in env
        or not given
        or any(v in ours for v in given.values())
    ):
        return
    variable, other = next(iter(given.items()))
    raise LaunchError(
        f"this is step {job}.{step} of Slurm, but {variable} is of step {other}: the variables of "
        "another step were inherited by this job. Submit jobs from within a step by sbatch "
        "--export=NONE, or say in the script, before anything is started: "
        "unset ${!PMI*} ${!SLURM_STEP*}.",
        everywhere=True,
    )


def is_walled_off(launcher: Launcher, above: Collection[str], proc: Path = Path("/proc")) -> bool:
    """Return whether this rank sits in a container that the launcher's process is not in.

    Args:
        launcher: what started the rank.
        above: names of the processes above it, as far as they are seen.
        proc: where the process file system is.
    """
    try:
        namespace = str((proc / "self" / "ns" / "pid").readlink())
    except OSError:  # not Linux
        return False
    # mpirun and all of its ranks in one container share what they need.
    return namespace != _FIRST_PID_NAMESPACE and launcher.processes.isdisjoint(above)


def initialize(MPI: Any, claim: Claim) -> None:  # noqa: N803
    """Initialise MPI. Collective: all ranks.

    Where some rank does not come, the process ends with a message that names it.
    """
    assert claim.launcher is not None
    seconds = limit_seconds(claim.world_size)
    with (
        _backstop(seconds + _BACKSTOP_SECONDS),
        marked(IN_MPI_INIT),
        ended_from_outside(seconds, lambda asked: _say_who_is_missing(claim, seconds, asked)),
    ):
        _call_mpi_init(MPI)


def _call_mpi_init(MPI: Any) -> None:  # noqa: N803
    """Call MPI_Init_thread without the interpreter's lock, which mpi4py would hold meanwhile."""
    try:
        function = ctypes.CDLL(MPI.__file__).MPI_Init_thread
    except (OSError, AttributeError):  # no symbol of that name: mpi4py knows its own way
        MPI.Init_thread(MPI.THREAD_FUNNELED)
        return
    provided = ctypes.c_int()
    # Funneled: the launch layer calls MPI from the main thread only.
    function(None, None, ctypes.c_int(MPI.THREAD_FUNNELED), ctypes.byref(provided))
    # As mpi4py has it: errors become exceptions.
    for communicator in (MPI.COMM_SELF, MPI.COMM_WORLD):
        communicator.Set_errhandler(MPI.ERRORS_RETURN)


def _say_who_is_missing(claim: Claim, seconds: float, asked: str | None) -> str | None:
    """Say why this process ends, and who is missing; one rank of a node reports.

    Args:
        claim: of this process.
        seconds: limit that has passed, if it has not been asked to end.
        asked: name of the signal that asked.
    """
    assert claim.launcher is not None
    ranks = ranks_of_node(claim.launcher)
    waiting = [rank for rank, seen in ranks.items() if seen.is_waiting]
    # Where some have left already they have said why.
    is_whole = len(ranks) >= (claim.local_world_size or 0)
    is_reporter = not ranks or (is_whole and claim.rank == min(waiting, default=None))
    if asked is not None:
        text = f"rank {claim.rank} was ended by {asked} while it waited for others in MPI_Init"
        return text if is_reporter else None
    if not is_reporter:
        time.sleep(2 * _HEAD_START_SECONDS)
    elif len(waiting) == len(ranks) > 0:
        time.sleep(_HEAD_START_SECONDS)  # another node knows more
    from hpctrain.launch.surroundings import other_hosts  # only needed here

    return missing_ranks_message(ranks, claim.world_size, seconds, other_hosts(os.environ))


@contextmanager
def _backstop(seconds: float) -> Iterator[None]:
    """End this process, with its stack, where even the thread that watches gets nowhere."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def check_shared_memory(claim: Claim, family: str, library: str, shared: Path = _SHARED) -> None:
    """Check that an MPI library finds the shared memory without which it would crash.

    Args:
        claim: of this process.
        family: of the library.
        library: its name, for the message.
        shared: where shared memory is.

    Raises:
        LaunchError: if it does not; of several ranks on a node one reports it.
    """
    try:
        found = os.statvfs(shared)
    except OSError:
        return  # not there, and the libraries look elsewhere
    total, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    problem = shared_memory_trouble(
        family,
        claim.local_world_size or 1,
        total=total,
        free=free,
        is_read_only=bool(found.f_flag & os.ST_RDONLY),
    )
    if problem is None:
        return
    # On one node all ranks find the same.
    is_one_node = claim.world_size is not None and claim.world_size == claim.local_world_size
    error = LaunchError(
        f"{shared} on {socket.gethostname()} {problem}: {library} would crash in MPI_Init. {_FIX}",
        everywhere=is_one_node,
    )
    error.reported = not error.everywhere and bool(claim.local_rank)
    raise error


def shared_memory_trouble(
    family: str, ranks: int, *, total: int, free: int, is_read_only: bool
) -> str | None:
    """Return what is wrong with shared memory for some ranks of a node; None if nothing is.

    Ranks that were faster have taken their part already: what is free counts for the own one alone.
    """
    if is_read_only:
        return "is read-only" if family == "mpich" else None
    needed = _needed(family, ranks, total)
    if total <= needed:
        return (
            f"has {size(total)} in all, where {plural(ranks, 'rank')} on this node need more than "
            f"{size(needed)}"
        )
    own = _needed(family, 1, total) if ranks == 1 else _MPICH_LEAST_BYTES_PER_RANK
    if family == "mpich" and free <= own:
        return f"has {size(free)} free of {size(total)}, where more than {size(own)} are needed"
    return None


def _needed(family: str, ranks: int, total: int) -> int:
    """Return what ranks need more than, where shared memory has so many bytes in all."""
    if family == "mpich":
        least = ranks * _MPICH_LEAST_BYTES_PER_RANK
        if total < _UCX_FROM_BYTES:
            return least
        return max(_UCX_FROM_BYTES + least, int(ranks * _UCX_BYTES_PER_RANK))
    if family == "intel" and ranks > 1:
        return _INTEL_BYTES + ranks * _INTEL_BYTES_PER_RANK
    return 0
