"""Run on every rank: reductions that one rank gets wrong are found, whichever element it is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch import distributed as dist

from hpctrain.launch.process_group import World
from hpctrain.preflight import reductions
from hpctrain.preflight.reductions import Reduction, judge_reductions, time_reductions

SIZES = (8, 2**14, 2**18 + 8)
CHANGED = {"SIZES": SIZES, "_MOST_REPEATS": 2, "_PART_ELEMENTS": 2**14}
"""So that it takes no time, and the largest size is compared in several parts."""


def table(world: World, reduce: Callable[[Tensor], object]) -> list[list[Reduction]]:
    before = {name: getattr(reductions, name) for name in CHANGED}
    vars(reductions).update(CHANGED)
    try:
        return world.communicator.all_gather(time_reductions(world, reduce))
    finally:
        vars(reductions).update(before)


def check_right_sums_pass(world: World) -> None:
    found = table(world, dist.all_reduce)
    assert [each.num_bytes for each in found[0]] == list(SIZES)
    assert all(each.wrong is None for rank in found for each in rank)


def check_one_wrong_element_is_found(world: World) -> None:
    """On the last rank only, at the end of the last part, by one bit."""
    last = world.topology.world_size - 1

    def reduce(tensor: Tensor) -> None:
        dist.all_reduce(tensor)
        if world.topology.rank == last:
            tensor[-1:].view(torch.int32)[0] ^= 1 << 16

    found = table(world, reduce)
    finding = judge_reductions(found, "gloo", world.topology.hosts * (last + 1), "gloo")
    assert finding.status == "fail"
    place = f"the first at {SIZES[-1] // 4 - 1:,}"
    for words in (f"gloo gives wrong sums of 8 B on rank {last} (", "1 of 2 elements", place):
        assert words in finding.fact, finding.fact
    assert {each["rank"] for each in finding.values["wrong"]} == {last}


def check_sums_of_other_ranks_or_places_are_found(world: World) -> None:
    """What every single rank sees as plausible numbers, and sums of ones would not show."""
    size, rank = world.topology.world_size, world.topology.rank

    def twice(tensor: Tensor) -> None:
        """Rank 0 counts twice, and the last one not at all."""
        if rank == size - 1:
            tensor.zero_()
        elif rank == 0:
            tensor.mul_(2)
        dist.all_reduce(tensor)

    def moved(tensor: Tensor) -> None:
        dist.all_reduce(tensor)
        tensor.copy_(tensor.roll(1))

    for reduce in (twice, moved):
        wrong = [each.wrong for each in table(world, reduce)[rank]]
        assert all(each is not None for each in wrong)


CHECKS = [
    check_right_sums_pass,
    check_one_wrong_element_is_found,
    check_sums_of_other_ranks_or_places_are_found,
]
