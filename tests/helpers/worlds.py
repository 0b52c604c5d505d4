"""Worlds for tests that start no job."""

from __future__ import annotations

import torch

from hpctrain.launch.communicators import SingleCommunicator
from hpctrain.launch.process_group import World
from hpctrain.topology import Topology


def world_of_one(launcher: str) -> World:
    """Return the world of one process, on the CPU."""
    topology = Topology(
        rank=0,
        world_size=1,
        local_rank=0,
        local_world_size=1,
        node_rank=0,
        num_nodes=1,
        hosts=("here",),
        launcher=launcher,
    )
    return World(
        topology=topology,
        communicator=SingleCommunicator(),
        device=torch.device("cpu"),
        backend=None,
    )
