"""The cores of every rank, and what it makes of them."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hpctrain.topology import Communicator, Topology
from hpctrain.utils.proc import allowed_cores, cpu_quotas
from hpctrain.utils.text import plural

logger = logging.getLogger("hpctrain")

# By `Topology.launcher`. Source: the manual pages of each.
UNPINNING = {
    "Open MPI's mpirun": "mpirun --bind-to none, or --map-by slot:PE=4 for four cores per rank",
    "MPICH's mpirun": "mpirun -bind-to none, or -bind-to core:4 for four cores per rank",
    "Intel MPI's mpirun": "I_MPI_PIN=off, or I_MPI_PIN_DOMAIN=4 for four cores per rank",
    "MVAPICH2's mpirun": "MV2_ENABLE_AFFINITY=0",
    "srun": "srun --cpus-per-task=4; that of sbatch does not reach srun",
    "jsrun": "jsrun --cpu_per_rs with --bind packed:4",
    "PALS mpiexec": "mpiexec --depth 4 --cpu-bind depth",
    "flux run": "flux run --cores-per-task=4",
}


@dataclass(frozen=True, slots=True)
class Cores:
    """The cores that a rank may use, of those of its node.

    Attributes:
        quotas: of its control groups: which group, and as many cores' time for all in it.
    """

    node_rank: int
    allowed: tuple[int, ...]
    num_on_node: int
    quotas: tuple[tuple[str, float], ...] = ()


def thread_budget(here: Cores, ranks: Sequence[Cores]) -> int:
    """Return the threads of a rank: its part of the cores and quotas that it shares with others.

    Args:
        here: of the rank.
        ranks: of all ranks, this one too.
    """
    beside = [cores for cores in ranks if cores.node_rank == here.node_rank]
    shares = [len(here.allowed) / sum(cores.allowed == here.allowed for cores in beside)]
    shares += [cpus / _num_in(group, beside) for group, cpus in here.quotas]
    return max(1, int(min(shares)))


def throttling(ranks: Sequence[Cores]) -> str | None:
    """Return what quota leaves the ranks less than a core each; None if none does."""
    for rank, cores in enumerate(ranks):
        beside = [other for other in ranks if other.node_rank == cores.node_rank]
        for group, cpus in cores.quotas:
            together = _num_in(group, beside)
            if cpus < together:
                return (
                    f"a quota of {cpus:g} cores (cpu.max of a control group) is there for "
                    f"{plural(together, 'rank')}, rank {rank} among them: the kernel stops them "
                    "now and then to keep to it; ask for more, or start fewer ranks per node"
                )
    return None


def _num_in(group: str, ranks: Sequence[Cores]) -> int:
    return sum(any(other == group for other, _ in cores.quotas) for cores in ranks)


def crowding(ranks: Sequence[Cores]) -> str | None:
    """Return what is wrong with how the ranks are pinned; None if nothing is.

    Ranks that may use the whole node are not pinned, whatever their number: that was asked for.
    """
    sharing = Counter((cores.node_rank, cores.allowed) for cores in ranks)
    for rank, cores in enumerate(ranks):
        allowed, together = len(cores.allowed), sharing[cores.node_rank, cores.allowed]
        if allowed == cores.num_on_node:
            continue
        if together > allowed:
            which = "core" if allowed == 1 else f"{allowed} cores"
            return (
                f"{together} ranks, rank {rank} among them, are pinned to the same {which} of "
                f"{cores.num_on_node}"
            )
        on_node = sum(other.node_rank == cores.node_rank for other in ranks)
        if allowed == 1 and cores.num_on_node >= 4 * on_node:
            return f"rank {rank} is pinned to 1 core of {cores.num_on_node}, beside its data reader"
    return None


def set_threads(communicator: Communicator, topology: Topology) -> int:
    """Give torch this rank's share of its cores. Collective: all ranks.

    A launcher that pins gives every rank its own cores; one that does not gives all of them all
    cores, which they then divide. OMP_NUM_THREADS, where it is set, is the user's word.

    Returns:
        The threads of this rank.
    """
    here = Cores(
        topology.node_rank,
        tuple(sorted(allowed_cores())),
        os.cpu_count() or 1,
        tuple((quota.group, quota.cpus) for quota in cpu_quotas()),
    )
    ranks: list[Cores] = communicator.all_gather(here)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(thread_budget(here, ranks))
    if topology.is_rank_zero and (quota := throttling(ranks)) is not None:
        logger.warning("%s", quota)
    problem = crowding(ranks)
    if problem is not None and topology.is_rank_zero:
        fix = UNPINNING.get(topology.launcher)
        logger.warning("%s%s", problem, "" if fix is None else f"; to change that: {fix}")
    return torch.get_num_threads()
