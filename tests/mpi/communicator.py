"""Run on every rank: the control plane behaves the same over MPI, over a store and alone.

communicator.py             in a whole world
communicator.py hold        after waiting for the end of stdin
communicator.py messages    without a process group, and so without torch
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import hpctrain
from hpctrain.config.schema import LaunchSection
from hpctrain.errors import DatasetError, HpctrainError
from hpctrain.launch.failure import guard
from hpctrain.launch.process_group import control_plane, gathering
from hpctrain.topology import raise_together

World = Any


def check_messages(world: World) -> None:
    communicator, rank = world.communicator, world.topology.rank
    size = world.topology.world_size
    for value in (None, 7, {"key": [1.5, "ü"]}, b"x" * 3_000_000):
        assert communicator.broadcast(value if rank == 0 else "not looked at") == value
    assert communicator.all_gather((rank, "x" * rank)) == [(r, "x" * r) for r in range(size)]
    for number in range(50):
        assert communicator.all_gather(number + rank) == [number + r for r in range(size)]
        assert communicator.broadcast(number) == number


def check_maxima_overlap_messages(world: World) -> None:
    communicator, rank = world.communicator, world.topology.rank
    size = world.topology.world_size
    for number in range(20):
        pending = communicator.start_max([rank, -rank, number, int(rank == 1)])
        time.sleep(0.002 * ((rank + number) % 3))
        communicator.barrier()
        assert pending.wait() == (size - 1, 0, number, int(size > 1))


def check_each_rank_fails_in_turn(world: World) -> None:
    communicator, rank = world.communicator, world.topology.rank
    for failing in range(world.topology.world_size):
        try:
            with raise_together(communicator):
                if rank == failing:
                    raise DatasetError("shard 3 is cut short")
        except HpctrainError as error:
            assert type(error) is DatasetError
            assert error.everywhere
            assert "shard 3 is cut short" in str(error)
            assert world.topology.world_size == 1 or f"rank {failing} on" in str(error)
        else:
            raise AssertionError("nothing was raised")
    with raise_together(communicator):
        pass
    try:
        with raise_together(communicator):
            raise DatasetError("the same everywhere")
    except DatasetError as error:
        assert str(error) == "the same everywhere"


@contextmanager
def without_a_process_group() -> Iterator[World]:
    with (
        control_plane() as (topology, communicator),
        guard(topology) as job_guard,
        gathering(topology, communicator, LaunchSection(), job_guard),
    ):
        yield SimpleNamespace(topology=topology, communicator=communicator, backend=None)


def main() -> None:
    only_messages = sys.argv[1:] == ["messages"]
    with without_a_process_group() if only_messages else hpctrain.connect() as world:
        if sys.argv[1:] == ["hold"]:  # for tests that have something else to do meanwhile
            print("met", flush=True)
            sys.stdin.read()
        check_messages(world)
        check_maxima_overlap_messages(world)
        check_each_rank_fails_in_turn(world)
        places = world.communicator.all_gather(
            (world.topology.rank, world.topology.local_rank, world.topology.world_size)
        )
        if world.topology.is_rank_zero:
            print("passed", len(places), world.topology.launcher, world.backend, flush=True)
        assert [place[0] for place in places] == list(range(world.topology.world_size))


if __name__ == "__main__":
    main()
