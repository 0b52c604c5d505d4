"""Collectives of an own loop: all_reduce and broadcast."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch import distributed as dist

from hpctrain.errors import ConfigError
from hpctrain.launch.process_group import World
from hpctrain.utils.text import did_you_mean

Reduction = Literal["mean", "sum", "min", "max"]

_OPERATIONS = {
    "mean": dist.ReduceOp.SUM,
    "sum": dist.ReduceOp.SUM,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
}


def reduce(world: World, value: Tensor | float, how: str) -> Tensor:
    """Return the mean, sum, minimum or maximum over all ranks, everywhere. Collective: all ranks.

    Args:
        world: the ranks.
        value: a number, or a tensor of the same shape on all ranks; it stays as it is.
        how: "mean", "sum", "min" or "max".

    Raises:
        ConfigError: if `how` is something else.
    """
    if how not in _OPERATIONS:
        raise ConfigError(
            f"world.reduce: {how!r}: expected one of {', '.join(_OPERATIONS)}"
            f"{did_you_mean(how, list(_OPERATIONS), quote=chr(34))}",
            everywhere=True,
        )
    if isinstance(value, Tensor):
        result = value.detach().to(world.device, copy=True)
    else:
        result = torch.tensor(value, dtype=torch.float64, device=world.device)
    if world.topology.world_size > 1:
        dist.all_reduce(result, op=_OPERATIONS[how])
    return result / world.topology.world_size if how == "mean" else result


def broadcast(world: World, value: Any) -> Any:
    """Return rank 0's value on every rank. Collective: all ranks.

    Args:
        world: the ranks.
        value: a tensor, of which all ranks have one in the same shape and dtype; or numbers, texts
            and containers of these, of which rank 0 has one.
    """
    if not isinstance(value, Tensor):
        return world.communicator.broadcast(value)
    result = value.detach().to(world.device, copy=True).contiguous()
    if world.topology.world_size > 1:
        dist.broadcast(result, src=0)
    return result
