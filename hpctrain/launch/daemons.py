"""The launcher's processes above a rank: when they are gone nobody clears up after the ranks.

hydra_pmi_proxy, prted, orted, slurmstepd or an agent of torchrun start the ranks of a node, some of
them under mpirun itself. Where one is killed its ranks train on: without output, beyond the reach
of a stop, and in the way of the next job. Shells above them are none of this: a job that was
started by `nohup mpirun ... &` outlives its shell.
"""

from __future__ import annotations

from pathlib import Path

from hpctrain.launch.ancestry import names_of
from hpctrain.launch.table import LAUNCHERS
from hpctrain.utils.proc import PROC, ancestors, name_of, start_time

FRONT_ENDS = frozenset(
    {
        *("mpirun", "mpiexec", "mpiexec.hydra", "hydra_bstrap_proxy"),
        *("mpirun.openmpi", "mpiexec.openmpi", "orterun", "mpirun.mpich", "mpiexec.mpich"),
        *("prterun", "torchrun", "torch.distributed.run"),
    }
)
"""What users call, and what it starts in between; Intel MPI's mpirun is a script that stays."""

Daemon = tuple[int, str, str, bool]
"""Process id, start time (ids are used again), name, and whether it started the ranks itself."""


def daemons_above(label: str, process: int | None = None, proc: Path = PROC) -> tuple[Daemon, ...]:
    """Return the processes through which a launcher has started this process, the nearest first.

    Args:
        label: of the launcher, as `Topology.launcher` has it.
        process: id of another process.
        proc: where the process file system is.
    """
    own = next((row.processes for row in LAUNCHERS if row.label == label), frozenset())
    found: list[Daemon] = []
    for pid in ancestors(process, proc):
        # A front end may be a script, whose own name it is then.
        names = [*names_of(pid, proc), *([name_of(pid, proc)] if found else [])]
        known = own if not found else own | FRONT_ENDS
        name = next((name for name in names if name in known), None)
        began = start_time(pid, proc)
        if name is not None and began is not None:
            found.append((pid, began, name, not found))
        elif found:
            break
    return tuple(found)
