"""/dev/shm, looked at before MPI_Init: MPI libraries that cannot live with it crash there.

Measured on tmpfs of 1 to 90 MiB with 1 to 16 ranks of a node, each of which sent and received
messages of up to 32 MB:

- MPICH 5.0.2 (ch4:ucx) ends by a bus error in MPI_Init with up to 1 MiB a rank. Below 16 MiB it
  does without shared memory then; from there on UCX takes 5.15 MiB a rank, at first 16 MiB at once,
  and ends by a segmentation fault where they are not there. Where /dev/shm is read-only it ends by
  a UCX error. All of this holds for one rank too. So the 64 MB of a container serve 12 ranks.
- Intel MPI 2021.18 takes up to 8 MiB for 2 to 12 ranks, most of it as messages grow; one rank none.
- Open MPI 5.0.11 does without.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from hpctrain.errors import LaunchError
from hpctrain.launch.launchers import Claim
from hpctrain.utils.text import plural, size

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
    error.reported = not error.everywhere and bool(claim.local_rank)
    raise error


def trouble(family: str, ranks: int, *, total: int, free: int, is_read_only: bool) -> str | None:
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
