"""Times messages, clocks and a fixed computation; looks host names up."""

from __future__ import annotations

import socket
import statistics
import time
from dataclasses import dataclass

import torch

from hpctrain.accelerator import synchronize
from hpctrain.topology import Communicator

_ROUNDS = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """What a node's resolver says.

    Attributes:
        own: addresses of this node's own host name; empty where it has none.
        rank_zero: those of rank 0's host name.
        seconds: that both took.
    """

    host: str
    own: tuple[str, ...]
    rank_zero: tuple[str, ...]
    seconds: float


def look_up(host: str, rank_zero_host: str) -> Lookup:
    """Look both names up."""
    begin = time.perf_counter()
    own = resolve(host)
    other = own if rank_zero_host == host else resolve(rank_zero_host)
    seconds = time.perf_counter() - begin
    return Lookup(host=host, own=own, rank_zero=other, seconds=seconds)


def resolve(name: str) -> tuple[str, ...]:
    """Return the addresses of a host name, none where it does not resolve."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return ()
    return tuple(dict.fromkeys(str(entry[4][0]).split("%", maxsplit=1)[0] for entry in found))


def clock_offset(communicator: Communicator) -> float:
    """Return how far this rank's clock is before rank 0's, s. Collective: all ranks.

    As exact as a barrier, which is some milliseconds.
    """
    offsets: list[float] = []
    for _ in range(_ROUNDS):
        communicator.barrier()
        now = time.time()
        offsets.append(now - communicator.broadcast(now))
    return statistics.median(offsets)


def barrier_wait(communicator: Communicator) -> float:
    """Return how long this rank waits for the others in a barrier, s. Collective: all ranks.

    Those that come last wait least.
    """
    waits = []
    communicator.barrier()
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        communicator.barrier()
        waits.append(time.perf_counter() - begin)
    return statistics.median(waits)


def fixed_computation(device: torch.device) -> float:
    """Return the time of a fixed multiplication of matrices, s: the median of some."""
    width = 4096 if device.type == "cuda" else 512
    matrix = torch.full((width, width), 1 / width, device=device)
    times: list[float] = []
    end = time.perf_counter() + 1.0
    while len(times) < 10 and (len(times) < 3 or time.perf_counter() < end):
        begin = time.perf_counter()
        for _ in range(4):
            matrix = matrix @ matrix
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
