"""The check of all-reduces: their time, and every number that comes out.

Networks have been seen to reduce wrongly without an error message: nobody looks at a gradient. So
what is summed here differs from rank to rank and from element to element, and its sum is known
exactly.

Source: corrupted results of NCCL over Slingshot with GPUDirect, NVIDIA/nccl issue 2001; that they
come of the protocol LL128, documentation.sigma2.no, hpc_machines/olivia/nccl, May 2026.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from hpctrain.accelerator import synchronize
from hpctrain.data.staging.node_cache import host_memory
from hpctrain.launch.process_group import World
from hpctrain.preflight.report import Finding
from hpctrain.utils.text import listed, number, size

SIZES = (8, 64 * 2**10, 2**20, 16 * 2**20, 64 * 2**20, 256 * 2**20)
"""Bytes of the gradients that are summed over all ranks."""
_SIZE_SECONDS = 1.0
_MOST_REPEATS = 30
_LONGEST_SECONDS = 2.0
_LONGEST_SECONDS_ON_HOST = 0.25
"""Of one call; on hosts, which are not what the largest size is for, that one has less time."""
_TELLING_BYTES = 2**20
_COPIES = 1.5
_MOST_OF_FREE = 0.25
"""Of the free memory of a node."""
_COMPARED_BYTES = 2**20
"""On a host, larger ones are compared in the first two calls only: comparing takes as long."""
_SHIFTS = 61
_PART_ELEMENTS = 2**22
"""Compared at once: what they should be takes memory, too."""
_LATENCY_SECONDS = {"nccl": 0.002}
_LATENCY_SECONDS_ELSE = 0.02
"""Of 8 bytes: above it, ranks are starved of their cores, or the network is not the fast one."""
_BYTES_PER_SECOND = {"nccl": 1e9}
_BYTES_PER_SECOND_ELSE = 50e6
"""Bus bandwidth of the largest size: below it, less than gigabit Ethernet, or NCCL over TCP."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrong:
    """Elements of a reduction that came out wrong on one rank.

    Attributes:
        count: of them, in the call that had most.
        index: of the first one.
        value: that it had.
        expected: that it should have.
    """

    count: int
    index: int
    value: float
    expected: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduction:
    """An all-reduce of one size, as one rank has seen it.

    Attributes:
        num_bytes: that were summed.
        seconds: of a call, the median.
        repeats: that were timed.
        wrong: None where every element was right, in every call.
    """

    num_bytes: int
    seconds: float
    repeats: int
    wrong: Wrong | None = None


def time_reductions(
    world: World, reduce: Callable[[Tensor], object] | None = None
) -> list[Reduction]:
    """Return the median time of an all-reduce for every size. Collective: all ranks.

    Each size takes about a second; those of which one call would take long, or which would take up
    a node's memory, are left out.

    Args:
        world: the ranks.
        reduce: sums a tensor over all ranks, in place; None: as torch does it.
    """
    results: list[Reduction] = []
    for num_bytes in SIZES:
        if results and _is_too_much(world, num_bytes, results[-1]):
            break
        trial = _Trial(world, num_bytes // 4, reduce or dist.all_reduce)
        # The first call also connects. All ranks have to repeat equally often.
        tries = [trial.run(compares=True) for _ in range(2)]
        slowest = max(world.communicator.all_gather(min(tries)))
        repeats = max(1, min(_MOST_REPEATS, int(_SIZE_SECONDS / max(slowest, 1e-9))))
        compares = world.device.type != "cpu" or num_bytes <= _COMPARED_BYTES
        times = [trial.run(compares=compares) for _ in range(repeats)]
        results.append(
            Reduction(
                num_bytes=num_bytes,
                seconds=statistics.median(times),
                repeats=repeats,
                wrong=trial.wrong,
            )
        )
    return results


def _is_too_much(world: World, num_bytes: int, before: Reduction) -> bool:
    """Tell whether the next size would take too long, or too much memory. Collective: all ranks."""
    on_host = world.device.type == "cpu"
    needed = _COPIES * num_bytes * world.topology.local_world_size
    is_large = on_host and needed > _MOST_OF_FREE * host_memory()[0]
    everyone = world.communicator.all_gather((before.seconds, is_large))
    # The time of short messages says nothing about long ones.
    is_known = before.num_bytes >= _TELLING_BYTES
    ratio = num_bytes / before.num_bytes if is_known else 0.0
    seconds = max(seconds for seconds, _ in everyone) * ratio
    longest = _LONGEST_SECONDS
    if on_host and num_bytes == SIZES[-1]:
        longest = _LONGEST_SECONDS_ON_HOST
    return seconds > longest or any(is_large for _, is_large in everyone)


class _Trial:
    """Reductions of one size.

    Element i of rank r is a(i) + b(r) c(i), in whole numbers, so that a float32 holds their sum
    exactly: that of a rank left out, counted twice or mixed with another place is another one.

    Attributes:
        wrong: what came out wrong so far, in the worst call.
    """

    def __init__(self, world: World, elements: int, reduce: Callable[[Tensor], object]) -> None:
        self.wrong: Wrong | None = None
        self._device = world.device
        self._reduce = reduce
        size = world.topology.world_size
        # Part by part the same, but for a number that is added.
        index = torch.arange(min(elements, _PART_ELEMENTS), device=world.device)
        a, c = index * 40503 // 64 % 64, 1 + index * 30011 // 128 % 4
        factors = [_factor(rank) for rank in range(size)]
        self._mine = (a + factors[world.topology.rank] * c).float()
        self._sum = (size * a + sum(factors) * c).float()
        self._ranks = size
        self._tensor = torch.empty(elements, dtype=torch.float32, device=world.device)

    def run(self, *, compares: bool) -> float:
        """Return the time of one reduction, s; compare what comes out if it `compares`."""
        for position, part in enumerate(self._tensor.split(_PART_ELEMENTS)):
            torch.add(self._mine[: len(part)], position % _SHIFTS, out=part)
        synchronize(self._device)
        begin = time.perf_counter()
        self._reduce(self._tensor)
        synchronize(self._device)
        seconds = time.perf_counter() - begin
        if compares:
            self._compare()
        return seconds

    def _compare(self) -> None:
        count, first = 0, None
        for position, part in enumerate(self._tensor.split(_PART_ELEMENTS)):
            expected = self._sum[: len(part)] + self._ranks * (position % _SHIFTS)
            if torch.equal(part, expected):
                continue
            places = (part != expected).nonzero().flatten()
            count += len(places)
            if first is None:
                place = int(places[0])
                at = position * _PART_ELEMENTS + place
                first = at, float(part[place]), float(expected[place])
        if first is not None and (self.wrong is None or count > self.wrong.count):
            self.wrong = Wrong(count=count, index=first[0], value=first[1], expected=first[2])


def _factor(rank: int) -> int:
    """Return a number of a rank's own: below 256, so that sums over 10,000 ranks stay exact."""
    return 1 + rank * 157 % 251


def judge_reductions(
    table: Sequence[Sequence[Reduction]],
    backend: str,
    hosts: Sequence[str] = (),
    carrier: str = "",
) -> Finding:
    """Look for wrong sums, and compare latency and bandwidth with what any working network has.

    Args:
        table: of every rank, the same sizes.
        backend: that carries them.
        hosts: of every rank.
        carrier: the backend with its version, and its way where that is known.
    """
    ranks = len(table)
    rows = []
    for column in zip(*table, strict=True):
        seconds = max(each.seconds for each in column)
        moved = 2 * (ranks - 1) / ranks * column[0].num_bytes
        rows.append((column[0].num_bytes, seconds, moved / seconds, column[0].repeats))
    latency, bandwidth = rows[0][1], rows[-1][2]
    most_latency = _LATENCY_SECONDS.get(backend, _LATENCY_SECONDS_ELSE)
    least_bandwidth = _BYTES_PER_SECOND.get(backend, _BYTES_PER_SECOND_ELSE)
    shown = ", ".join(
        f"{_binary(count)} {number(seconds * 1000)} ms ({size(round(rate))}/s)"
        if count > 8
        else f"{_binary(count)} {number(seconds * 1e6)} us"
        for count, seconds, rate, _ in rows
    )
    values = {
        "backend": backend,
        "sizes": [
            {"bytes": c, "seconds": s, "bus_bytes_per_second": r, "repeats": n}
            for c, s, r, n in rows
        ],
    }
    if any(each.wrong for rank in table for each in rank):
        return _wrong_reductions(table, hosts, carrier or backend, values)
    slow = []
    if latency > most_latency:
        slow.append(f"latency above {number(most_latency * 1000)} ms")
    if bandwidth < least_bandwidth:
        slow.append(f"bandwidth below {size(int(least_bandwidth))}/s")
    if not slow:
        return Finding(name="all-reduce", status="pass", fact=f"{backend}: {shown}", values=values)
    fix = (
        "NCCL_DEBUG=INFO shows the transport; NET/Socket means that its plug-in for the site's "
        "network is missing"
        if backend == "nccl"
        else "give every rank a core of its own, and name the fast network by launch.interface"
    )
    return Finding(
        name="all-reduce",
        status="warn",
        fact=f"{backend}: {shown}; {' and '.join(slow)}",
        fix=fix,
        values=values,
    )


def _wrong_reductions(
    table: Sequence[Sequence[Reduction]],
    hosts: Sequence[str],
    carrier: str,
    values: Mapping[str, object],
) -> Finding:
    """Name the ranks, nodes and sizes of sums that came out wrong."""
    stories, found = [], []
    for column in zip(*table, strict=True):
        wrong = {rank: each.wrong for rank, each in enumerate(column) if each.wrong is not None}
        for rank, each in wrong.items():
            found.append({"bytes": column[0].num_bytes, "rank": rank, "wrong": each.count})
        if wrong:
            rank, first = next(iter(wrong.items()))
            names = listed([str(rank) for rank in wrong], 8)
            nodes = listed(list(dict.fromkeys(hosts[rank] for rank in wrong)), 8) if hosts else "?"
            stories.append(
                f"{_binary(column[0].num_bytes)} on rank {names} ({nodes}): on rank {rank} "
                f"{first.count:,} of {column[0].num_bytes // 4:,} elements, the first at "
                f"{first.index:,}: {first.value:g} in place of {first.expected:g}"
            )
    return Finding(
        name="all-reduce",
        status="fail",
        fact=f"{carrier} gives wrong sums of {'; of '.join(stories)}",
        fix="training would learn from wrong gradients and say nothing. Leave these nodes out and "
        "try again; where others fail too: another protocol (NCCL_PROTO=^LL128), no GPUDirect "
        "(NCCL_NET_GDR_LEVEL=LOC, and gdrcopy off), or other versions of NCCL, its plug-in and "
        "libfabric; give the site this line",
        values={**values, "wrong": found},
    )


def _binary(num_bytes: int) -> str:
    for unit, factor in (("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= factor:
            return f"{num_bytes // factor} {unit}"
    return f"{num_bytes} B"
