"""MPI: the world it sees, and the control plane over it. The only importer of mpi4py."""

from __future__ import annotations

import faulthandler
import os
import pickle
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpctrain.errors import LaunchError
from hpctrain.launch.ancestry import ancestors
from hpctrain.launch.containers import WITHOUT_SHARED_MEMORY, is_walled_off
from hpctrain.launch.launchers import Claim
from hpctrain.launch.pmi import check_process_manager
from hpctrain.topology import closing_together

# MPI carries control messages from host memory only. A GPU-aware MPI would open the device at
# MPI_Init, before the rank has chosen its own.
HOST_ONLY = {"MPICH_GPU_SUPPORT_ENABLED": "0", "MPIR_CVAR_ENABLE_GPU": "0", "I_MPI_OFFLOAD": "0"}

_LONGEST_PAUSE_SECONDS = 0.005
# Thousands of ranks take minutes.
_INIT_SECONDS = 900.0


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
    check_process_manager(claim.launcher, os.environ, version)
    # Funneled: the launch layer calls MPI from the main thread only.
    if MPI.Is_finalized():
        raise LaunchError(
            f"{library} has been finalized in this process, and cannot be started again: MPI runs "
            "once a process. Call hpctrain.connect() once, and before anything that finalizes MPI.",
            everywhere=True,
        )
    is_ours = not MPI.Is_initialized()
    if is_ours:
        with _bounded():
            MPI.Init_thread(MPI.THREAD_FUNNELED)
    _check_world(claim, library, MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size())
    communicator = MPICommunicator(MPI.COMM_WORLD.Dup(), library)
    with closing_together(communicator, MPI.Finalize if is_ours else communicator.free):
        yield communicator


@contextmanager
def _bounded() -> Iterator[None]:
    """End this process, with its stack, where MPI_Init waits for a rank that died on its way."""
    faulthandler.dump_traceback_later(_INIT_SECONDS, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


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


class MPICommunicator:
    """The control plane over MPI, from host memory.

    Blocking MPI calls poll as fast as they can: sixteen ranks in a barrier on two cores starve
    the one that works. Every wait here tests a non-blocking request with short, growing pauses.
    """

    def __init__(self, communicator: Any, library: str) -> None:
        self._messages = communicator
        # A posted maximum is still in flight while other messages pass.
        self._reductions = communicator.Dup()
        self.library = library
        self.rank: int = communicator.Get_rank()
        self.world_size: int = communicator.Get_size()

    def free(self) -> None:
        """Give the communicators back to MPI, which goes on without. Collective: all ranks."""
        self._reductions.Free()
        self._messages.Free()

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank; it must pickle. Collective: all ranks."""
        payload = bytearray(pickle.dumps(value)) if self.rank == 0 else bytearray()
        size = array("q", [len(payload)])
        _wait(self._messages.Ibcast(size, root=0))
        if self.rank != 0:
            payload = bytearray(size[0])
        _wait(self._messages.Ibcast(payload, root=0))
        return value if self.rank == 0 else pickle.loads(payload)

    def all_gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order. Collective: all ranks."""
        payload = pickle.dumps(value)
        sizes = array("q", [0] * self.world_size)
        _wait(self._messages.Iallgather(array("q", [len(payload)]), sizes))
        received = bytearray(sum(sizes))
        _wait(self._messages.Iallgatherv(payload, (received, list(sizes))))
        values, start = [], 0
        for size in sizes:
            values.append(pickle.loads(received[start : start + size]))
            start += size
        return values

    def barrier(self) -> None:
        """Return once every rank has come. Collective: all ranks."""
        _wait(self._messages.Ibarrier())

    def start_max(self, values: Sequence[int]) -> PendingMaximum:
        """Start an elementwise maximum of int64 values. Collective: all ranks."""
        from mpi4py import MPI

        sent = array("q", values)
        received = array("q", [0] * len(values))
        request = self._reductions.Iallreduce(sent, received, op=MPI.MAX)
        return PendingMaximum(request, sent, received)


class PendingMaximum:
    """A maximum in flight; it keeps the buffers that MPI still reads and writes."""

    def __init__(self, request: Any, sent: array[int], received: array[int]) -> None:
        self._request = request
        self._sent = sent
        self._received = received

    def wait(self) -> tuple[int, ...]:
        """Return the elementwise maximum over all ranks."""
        _wait(self._request)
        return tuple(self._received)


def abort(code: int) -> None:
    """End all ranks of the job through MPI, if it runs. Not collective."""
    import sys

    MPI = sys.modules.get("mpi4py.MPI")  # noqa: N806
    if MPI is not None and MPI.Is_initialized() and not MPI.Is_finalized():
        MPI.COMM_WORLD.Abort(code)


def _wait(request: Any) -> None:
    pause = 0.0
    while not request.Test():
        time.sleep(pause)
        pause = min(pause + 2e-5, _LONGEST_PAUSE_SECONDS)
