"""How gradients travel, for the header: what NCCL has said of it on every rank."""

from __future__ import annotations

import logging

from hpctrain.launch.nccl_log import Transport, combine, describe, find_trouble
from hpctrain.launch.process_group import World

logger = logging.getLogger("hpctrain")


def gather_transport(world: World) -> Transport | None:
    """Return what NCCL says of its way, None where it does not run. Collective: all ranks.

    To be called once gradients have been reduced: NCCL connects when it has to.
    """
    if world.backend != "nccl" or world.topology.world_size == 1:
        return None
    found = world.communicator.all_gather(
        Transport() if world.nccl_log is None else world.nccl_log.read()
    )
    return combine(found)


def transport_notes(world: World) -> list[str]:
    """Return a line for the header, and warn of a slow way beside a fast one.

    Collective: all ranks.
    """
    transport = gather_transport(world)
    if transport is None:
        return []
    num_nodes = world.topology.num_nodes
    if world.topology.is_rank_zero and (trouble := find_trouble(transport, num_nodes)):
        logger.warning(trouble)
    told = describe(transport, num_nodes)
    return [f"gradients: {told}"] if told else []
