"""/dev/shm, looked at before MPI_Init: MPI libraries that cannot live with it crash there.

Measured on tmpfs of several sizes: MPICH 5.0.2 (ch4:ucx) ends by a bus error in MPI_Init where
/dev/shm has up to 1 MiB a rank of the node, by a UCX error where it is read-only, both for one rank
too. Intel MPI 2021.18 needs more than 2 MiB for two ranks and more. Open MPI 5.0.11 does without.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from hpctrain.errors import LaunchError
from hpctrain.launch.launchers import Claim
from hpctrain.utils.text import size

_SHARED = Path("/dev/shm")
_MPICH_BYTES_PER_RANK = 2**20
_INTEL_BYTES = 2**21
_FIX = (
    "Give the container more (docker run --shm-size=8g or --ipc=host, in Kubernetes an emptyDir "
    "with medium: Memory at /dev/shm), or remove what dead jobs have left there."
)


def check_shared_memory(claim: Claim, family: str, library: str, shared: Path = _SHARED) -> None:
    """Check that an MPI library finds the shared memory without which it would crash.

    Args:
        claim: of this process.
        family: of the library.
        library: its name, for the message.
        shared: where shared memory is.

    Raises:
        LaunchError: if it does not; of several ranks on a node one tells it.
    """
    try:
        found = os.statvfs(shared)
    except OSError:
        return  # not there, and the libraries look elsewhere
    total, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    problem = trouble(
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
    error.told = not error.everywhere and bool(claim.local_rank)
    raise error


def trouble(family: str, ranks: int, *, total: int, free: int, is_read_only: bool) -> str | None:
    """Return what is wrong with shared memory for some ranks of a node; None if nothing is.

    Ranks that were faster have taken their part already: what is free counts for the own one alone.
    """
    if family == "mpich" and is_read_only:
        return "is read-only"
    needed = {"mpich": _MPICH_BYTES_PER_RANK * ranks, "intel": _INTEL_BYTES if ranks > 1 else 0}
    if family not in needed or is_read_only:
        return None
    if total <= needed[family]:
        return f"has {size(total)} in all, where more than {size(needed[family])} are needed"
    if family == "mpich" and free < _MPICH_BYTES_PER_RANK:
        return f"has {size(free)} free of {size(total)}"
    return None
