"""Times all-reduces of the sizes that gradients have, and looks at every number that comes out.

Networks have been seen to reduce wrongly without a word: nobody looks at a gradient. So what is
summed here differs from rank to rank and from element to element, and its sum is known exactly.

Source: corrupted results of NCCL over Slingshot with GPUDirect, NVIDIA/nccl issue 2001.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from hpctrain.accelerator import synchronize
from hpctrain.data.reading.node_memory import host_memory
from hpctrain.launch.world import World

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
_LOOKED_AT_BYTES = 2**20
"""On a host, larger ones are looked at in the first two calls only: looking takes as long."""
_SHIFTS = 61
_PART_ELEMENTS = 2**22
"""Compared at once: what they should be takes memory, too."""


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
        tries = [trial.run(looks=True) for _ in range(2)]
        slowest = max(world.communicator.all_gather(min(tries)))
        repeats = max(1, min(_MOST_REPEATS, int(_SIZE_SECONDS / max(slowest, 1e-9))))
        looks = world.device.type != "cpu" or num_bytes <= _LOOKED_AT_BYTES
        times = [trial.run(looks=looks) for _ in range(repeats)]
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

    def run(self, *, looks: bool) -> float:
        """Return the time of one reduction, s; compare what comes out if it `looks`."""
        for number, part in enumerate(self._tensor.split(_PART_ELEMENTS)):
            torch.add(self._mine[: len(part)], number % _SHIFTS, out=part)
        synchronize(self._device)
        begin = time.perf_counter()
        self._reduce(self._tensor)
        synchronize(self._device)
        seconds = time.perf_counter() - begin
        if looks:
            self._look()
        return seconds

    def _look(self) -> None:
        count, first = 0, None
        for number, part in enumerate(self._tensor.split(_PART_ELEMENTS)):
            expected = self._sum[: len(part)] + self._ranks * (number % _SHIFTS)
            if torch.equal(part, expected):
                continue
            places = (part != expected).nonzero().flatten()
            count += len(places)
            if first is None:
                place = int(places[0])
                at = number * _PART_ELEMENTS + place
                first = at, float(part[place]), float(expected[place])
        if first is not None and (self.wrong is None or count > self.wrong.count):
            self.wrong = Wrong(count=count, index=first[0], value=first[1], expected=first[2])


def _factor(rank: int) -> int:
    """Return a number of a rank's own: below 256, so that sums over 10,000 ranks stay exact."""
    return 1 + rank * 157 % 251
