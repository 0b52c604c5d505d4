"""Large objects of all ranks, brought to rank 0 piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import distributed as dist

from hpctrain.launch.messages import decode, encode
from hpctrain.launch.process_group import World

T = TypeVar("T")

_SMALL_BYTES = 64 * 1024
"""At most so much of a rank goes over the control plane."""
_BUFFER_BYTES = 256 * 1024 * 1024
"""What rank 0 receives at a time, of all ranks together."""


def gather_at_rank_zero(value: T, world: World) -> list[T] | None:
    """Return every rank's value on rank 0, in rank order, else None. Collective: all ranks.

    Small values go over the control plane, large ones the way of gradients.

    Args:
        value: of the types that `hpctrain.launch.messages` knows; tensors in it on the host. What
            comes over the network is never unpickled.
        world: the ranks.
    """
    if world.topology.world_size == 1:
        return [value]
    payload = b"" if world.topology.is_rank_zero else encode(value)
    small = payload if len(payload) <= _SMALL_BYTES else None
    messages: list[tuple[int, bytes | None]] = world.communicator.all_gather((len(payload), small))
    sizes = [0 if message is not None else size for size, message in messages]
    large = _gather_bytes(payload if small is None else b"", sizes, world)
    if large is None:
        return None
    payloads = [
        large[rank] if message is None else message for rank, (_, message) in enumerate(messages)
    ]
    return [value, *(decode(item) for item in payloads[1:])]


def _gather_bytes(payload: bytes, sizes: Sequence[int], world: World) -> list[bytearray] | None:
    """Return every rank's bytes on rank 0, else None. Collective: all ranks.

    Args:
        payload: of this rank.
        sizes: of the payloads of all ranks.
        world: the ranks.
    """
    is_rank_zero, world_size = world.topology.is_rank_zero, world.topology.world_size
    # All ranks send equally many bytes: gather knows no others.
    length = min(max(sizes), _BUFFER_BYTES // world_size)
    received = [bytearray() for _ in sizes]
    for start in range(0, max(sizes), max(1, length)):
        piece = torch.zeros(length, dtype=torch.uint8)
        mine = bytearray(payload[start : start + length])
        if mine:
            piece[: len(mine)] = torch.frombuffer(mine, dtype=torch.uint8)
        piece = piece.to(world.device)
        pieces = [torch.empty_like(piece) for _ in sizes] if is_rank_zero else None
        dist.gather(piece, pieces, dst=0)
        for rank, item in enumerate(pieces or ()):
            count = max(0, min(length, sizes[rank] - start))
            received[rank] += item[:count].cpu().numpy().tobytes()
    return received if is_rank_zero else None
