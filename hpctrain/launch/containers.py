"""Ranks in containers of their own: shared memory that MPI takes for granted and is not there.

An MPI library that finds its ranks on one machine maps each other's memory, by process id (CMA) or
through /dev/shm. A container of its own for every rank splits process ids, and maybe /dev/shm:
MPICH 5 fails in its first large message then, or hangs in MPI_Init; Open MPI 5 crashes.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from hpctrain.launch.table import Launcher

# Messages between ranks of one machine through the network layer; only control messages are MPI's.
# Intel MPI needs nothing, but always a /dev/shm that its ranks share.
WITHOUT_SHARED_MEMORY = {"MPIR_CVAR_NOLOCAL": "1", "OMPI_MCA_btl": "^sm,vader"}

# Source: PROC_PID_INIT_INO of the Linux kernel's include/linux/proc_ns.h.
_FIRST_PID_NAMESPACE = "pid:[4026531836]"


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
