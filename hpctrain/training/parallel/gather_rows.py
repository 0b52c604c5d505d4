"""all_gather with gradients, of as many rows as each rank has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from hpctrain.launch.process_group import World


def gather_rows(world: World, tensor: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """Return the rows of all ranks, in rank order, with their gradients. Collective: all ranks.

    Args:
        world: the ranks.
        tensor: (rows, ...); ranks may have different numbers of rows. A number, (), is one row.
        sizes: rows of each rank, where that is known; else they are asked for.

    Returns:
        (rows of all ranks, ...). In a backward pass the rows of this rank get the sum of the
        gradients that all ranks give them.
    """
    rows = tensor.unsqueeze(0) if tensor.ndim == 0 else tensor
    if world.topology.world_size == 1:
        return rows
    result: Tensor = _AllGather.apply(world, rows, sizes)  # type: ignore[no-untyped-call]
    return result


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, world: World, rows: Tensor, known: Sequence[int] | None) -> Tensor:
        ranks, rank = world.topology.world_size, world.topology.rank
        sizes = _sizes(rows, ranks) if known is None else known
        # All ranks send equally many rows: gloo and NCCL know no others.
        padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded)
        ctx.first = sum(sizes[:rank])
        ctx.stop = ctx.first + sizes[rank]
        return torch.cat([item[:size] for item, size in zip(gathered, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return None, gradient[ctx.first : ctx.stop], None


def _sizes(rows: Tensor, ranks: int) -> list[int]:
    """Return how many rows each rank has. Collective: all ranks."""
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(ranks)]
    dist.all_gather(counts, count)
    return [int(item) for item in torch.cat(counts).tolist()]
