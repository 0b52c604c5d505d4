"""Parameters are equal on all ranks: compared by checksums."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from hpctrain.errors import TrainingError
from hpctrain.launch.process_group import World
from hpctrain.utils.text import listed

_SHOWN = 4
# Integers of the size of an element: sums of their bits are exact in any order.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_equal_shapes(model: nn.Module, world: World) -> None:
    """Compare names, shapes and types of parameters and buffers. Collective: all ranks.

    Raises:
        TrainingError: on every rank, naming the first that differs.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    mine = [(name, f"{tuple(item.shape)} {item.dtype}") for name, item in named]
    digest = hashlib.blake2b(repr(mine).encode(), digest_size=16).hexdigest()
    digests = world.communicator.all_gather(digest)
    if len(set(digests)) == 1:
        return
    everyone = world.communicator.all_gather(mine)
    usual = everyone[digests.index(max(digests, key=digests.count))]
    rank, theirs = next((rank, item) for rank, item in enumerate(everyone) if item != usual)
    here, there = dict(usual), dict(theirs)
    name = next(name for name in {**here, **there} if here.get(name) != there.get(name))
    raise TrainingError(
        f"the model is another one on rank {rank}: {name} is {there.get(name, 'not in it')}, "
        f"and {here.get(name, 'not in it')} on other ranks. Build it from its arguments alone, "
        "not from the rank, the host or an unseeded draw",
        everywhere=True,
    )


def check_equal_parameters(model: nn.Module, world: World, step: int) -> None:
    """Compare the parameters of all ranks, bit for bit. Collective: all ranks.

    Reads all parameters once on the device and sends one hash; names only where they differ.

    Args:
        model: the bare model.
        world: the ranks.
        step: for the message.

    Raises:
        TrainingError: on every rank, naming parameters and ranks.
    """
    if world.topology.world_size == 1:
        return
    names = [name for name, _ in model.named_parameters()]
    sums = torch.stack([checksum(item.detach()) for item in model.parameters()]).tolist()
    digest = hashlib.blake2b(repr(sums).encode(), digest_size=16).hexdigest()
    digests = world.communicator.all_gather(digest)
    if len(set(digests)) == 1:
        return
    everyone = world.communicator.all_gather(sums)
    # What most ranks hold is taken for right; among equals the lowest rank's.
    right = everyone[digests.index(max(digests, key=digests.count))]
    wrong = [rank for rank, theirs in enumerate(everyone) if theirs != right]
    differing = [
        name
        for index, name in enumerate(names)
        if any(everyone[rank][index] != right[index] for rank in wrong)
    ]
    shown = listed(differing, _SHOWN)
    raise TrainingError(
        f"step {step}: parameters differ between ranks: {shown} ({len(differing)} of "
        f"{len(names)}) on rank {', '.join(map(str, wrong))} of {len(everyone)} is not what the "
        "others have. Something changes them outside of the step, or a device computes wrongly: "
        "go on from the last checkpoint, without that host if it happens there again",
        everywhere=True,
    )


def checksum(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's elements taken as integers, () int64: every bit counts."""
    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)
