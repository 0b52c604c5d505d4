"""Which rank is where: nodes distinguished, and a rank's place among all."""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpctrain.launch.environment import Claim
from hpctrain.topology import Communicator, Topology
from hpctrain.utils.proc import boot_id
from hpctrain.utils.text import listed, printable, ranges

logger = logging.getLogger("hpctrain")


@dataclass(frozen=True, slots=True)
class Node:
    """What distinguishes two nodes.

    The host name alone does not: containers and cloned images share names. Nor does the boot id
    alone: two containers on one machine with their own names may not share memory or network.
    """

    boot_id: str
    host: str

    @classmethod
    def here(cls) -> Node:
        """Return the node of this process."""
        return cls(boot_id(), socket.gethostname())


def discover(
    claim: Claim, communicator: Communicator, mpi: str | None, *, program: int = 0
) -> Topology:
    """Return the place of this rank in the proven world. Collective: all ranks.

    Args:
        claim: what the launcher says.
        communicator: of all ranks.
        mpi: name of the library.
        program: which of the programs of one mpirun this is.
    """
    everyone = communicator.all_gather((Node.here(), program))
    nodes = [node for node, _ in everyone]
    others = [rank for rank, (_, number) in enumerate(everyone) if number != everyone[0][1]]
    if others and communicator.rank == 0:
        logger.warning(
            "ranks %s were started by mpirun as another program (MPI.APPNUM), and are in this "
            "world; hpctrain.connect(communicator=...) takes a part of them",
            listed(ranges(others), 8),
        )
    return place(
        communicator.rank,
        nodes,
        launcher="none" if claim.launcher is None else claim.launcher.label,
        mpi=mpi,
        reasons=claim.reasons,
    )


def place(
    rank: int,
    nodes: Sequence[Node],
    *,
    launcher: str,
    mpi: str | None,
    reasons: Mapping[str, str] | None = None,
) -> Topology:
    """Return the topology of `rank`, given the node of every rank.

    Local ranks follow the global ones, and nodes their lowest rank. The launcher's own local
    ranks are another permutation: mixing the two would put two ranks on one device.
    """
    order = list(dict.fromkeys(nodes))
    here = [other for other, node in enumerate(nodes) if node == nodes[rank]]
    by_node = "order of the ranks on this boot id and host name"
    return Topology(
        rank=rank,
        world_size=len(nodes),
        local_rank=here.index(rank),
        local_world_size=len(here),
        node_rank=order.index(nodes[rank]),
        num_nodes=len(order),
        hosts=tuple(printable(node.host) for node in order),
        launcher=launcher,
        mpi=mpi,
        reasons={**(reasons or {}), "local_rank": by_node, "local_world_size": by_node},
    )
