"""The device of every rank, and its share of the cores."""

from __future__ import annotations

import os

import torch

from hpctrain.config.schema import LaunchSection
from hpctrain.errors import LaunchError
from hpctrain.topology import Communicator, Topology


def device_index(visible: int, local_rank: int, local_world_size: int) -> int | None:
    """Return which of the visible devices a rank takes; None if there is no clean answer.

    A launcher that binds devices shows each rank one, as index 0; one that does not shows all.
    """
    if visible == 1:
        return 0
    return local_rank if visible >= local_world_size else None


def choose_device(
    section: LaunchSection, topology: Topology, communicator: Communicator
) -> torch.device:
    """Return the device of this rank and make it current. Collective: all ranks.

    Raises:
        LaunchError: on every rank, if there is no GPU where one is asked for, fewer than ranks,
            or if two ranks would share one.
    """
    if section.device == "cpu":
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    places = communicator.all_gather(
        (topology.host, topology.local_rank, topology.local_world_size, visible)
    )
    if section.device == "auto" and not any(count for *_, count in places):
        return torch.device("cpu")
    for rank, (host, local_rank, local_world_size, count) in enumerate(places):
        if device_index(count, local_rank, local_world_size) is None:
            raise LaunchError(
                f"rank {rank} on {host} has no GPU of its own: {_count(local_world_size, 'rank')} "
                f"there, {_count(count, 'visible GPU')}. Start as many ranks per node as it has "
                'GPUs, or ask the scheduler for more; launch.device = "cpu" trains without.',
                everywhere=True,
            )
    index = device_index(visible, topology.local_rank, topology.local_world_size)
    assert index is not None
    torch.cuda.set_device(index)
    owners = communicator.all_gather(
        (topology.host, str(torch.cuda.get_device_properties(index).uuid))
    )
    for rank, owner in enumerate(owners):
        if (first := owners.index(owner)) != rank:
            raise LaunchError(
                f"ranks {first} and {rank} on {owner[0]} share one GPU ({owner[1]}), on which NCCL "
                "cannot run. Bind one GPU per rank (srun --gpus-per-task=1 --gpu-bind=closest), or "
                "start fewer ranks per node.",
                everywhere=True,
            )
    return torch.device("cuda", index)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def thread_budget(cores: int, sharing: int) -> int:
    """Return the threads of a rank that shares `cores` cores with `sharing - 1` others."""
    return max(1, cores // sharing)


def set_threads(communicator: Communicator, topology: Topology) -> int:
    """Give torch this rank's share of its cores. Collective: all ranks.

    A launcher that pins gives every rank its own cores; one that does not gives all of them all
    cores, which they then divide. OMP_NUM_THREADS, where it is set, is the user's word.
    """
    cores = tuple(sorted(_affinity()))
    masks = communicator.all_gather((topology.node_rank, cores))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(thread_budget(len(cores), masks.count((topology.node_rank, cores))))
    return torch.get_num_threads()


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))
