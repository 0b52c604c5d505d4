"""MPI: the world it sees, and the control plane over it. The only importer of mpi4py."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpctrain.errors import LaunchError
from hpctrain.launch.ancestry import ancestors
from hpctrain.launch.containers import WITHOUT_SHARED_MEMORY, is_walled_off
from hpctrain.launch.launchers import Claim, this_process
from hpctrain.launch.mpi_communicator import MPICommunicator
from hpctrain.launch.mpi_init import initialize
from hpctrain.launch.pmi import check_descriptor, check_process_manager
from hpctrain.launch.shared_memory import check_shared_memory
from hpctrain.topology import closing_together

# MPI carries control messages from host memory only. A GPU-aware MPI would open the device at
# MPI_Init, before the rank has chosen its own.
HOST_ONLY = {"MPICH_GPU_SUPPORT_ENABLED": "0", "MPIR_CVAR_ENABLE_GPU": "0", "I_MPI_OFFLOAD": "0"}


@contextmanager
def mpi_world(claim: Claim) -> Iterator[MPICommunicator]:
    """Initialise MPI and give the communicator of the world that the launcher claims.

    Collective: all ranks. MPI is finalized only where the body succeeds: after a failure the
    others may be anywhere, and MPI_Finalize would wait for them. Where somebody else has
    initialised MPI in this process, it is joined, and theirs to finalize.

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
    if is_ours and is_alone:
        # It is not collective then, and so can wait until nobody may want to connect again.
        atexit.register(_finalize, MPI)
    finalize = is_ours and not is_alone
    with closing_together(communicator, MPI.Finalize if finalize else communicator.free):
        yield communicator


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


def library_name(version: str) -> str:
    """Return name and version from what MPI_Get_library_version says, such as "MPICH 5.0.2".

    MPICH goes on with lines about its build, Open MPI with its package and commit.
    """
    first = version.strip("\0 \n").splitlines()[0]
    words = first.replace("Version:", " ").split(",")[0].split()
    return " ".join(word for word in words if word not in ("Library", "Version"))


def library_family(library: str) -> str:
    """Return the family of an MPI library from its version string, "unknown" if it has none.

    Source: the first words of MPI_Get_library_version of each implementation.
    """
    for words, family in (
        ("Spectrum MPI", "spectrum"),
        ("Open MPI", "openmpi"),
        ("Intel(R) MPI", "intel"),
        ("MVAPICH", "mvapich"),
        ("CRAY MPICH", "cray"),
        ("MPICH", "mpich"),
    ):
        if words.lower() in library.lower():
            return family
    return "unknown"


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
