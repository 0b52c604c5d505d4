"""Tensors that rank 0 has read, handed to every rank over the process group."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch import distributed as dist

from hpctrain.checkpoint.tensors import tensor_bytes
from hpctrain.launch.process_group import World


def broadcast_tensors(world: World, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return rank 0's tensors on every rank. Collective: all ranks.

    So that a checkpoint is read, and its checksums verified, once and not once per rank.

    Args:
        world: the ranks.
        tensors: by name, any shapes and dtypes; only rank 0's are looked at.

    Returns:
        The same tensors on the host, by name.
    """
    if world.topology.world_size == 1:
        assert tensors is not None
        return dict(tensors)
    headers = world.communicator.broadcast(
        [(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]
        if tensors is not None
        else None
    )
    received = {}
    for name, shape, dtype in headers:
        if world.topology.is_rank_zero:
            assert tensors is not None
            tensor = tensors[name].to(world.device)
        else:
            tensor = torch.empty(shape, dtype=dtype, device=world.device)
        dist.broadcast(tensor_bytes(tensor), src=0)
        received[name] = tensor.cpu()
    return received


def broadcast_model(world: World, model: nn.Module) -> None:
    """Give every rank rank 0's parameters and buffers, as DDP does. Collective: all ranks."""
    for tensor in [*model.parameters(), *model.buffers()]:
        data = tensor_bytes(tensor.to(world.device))
        if data.numel():
            dist.broadcast(data, src=0)
            with torch.no_grad():
                tensor.copy_(data.view(tensor.dtype).view(tensor.shape))


def broadcast_buffers(world: World, model: nn.Module) -> None:
    """Give every rank rank 0's buffers, by their names. Collective: all ranks.

    A rank that has not run the model yet may lack some, or have them in another shape.
    """
    facts = [(name, item.shape, item.dtype) for name, item in model.named_buffers()]
    for name, shape, dtype in world.communicator.broadcast(facts):
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        buffer = module._buffers.get(key)
        if buffer is None or (buffer.shape, buffer.dtype) != (shape, dtype):
            buffer = torch.empty(shape, dtype=dtype, device=world.device)
        data = tensor_bytes(buffer)
        if data.numel():
            dist.broadcast(data, src=0)
        module._buffers[key] = data.view(dtype).view(shape)
