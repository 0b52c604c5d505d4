"""Run on every rank: rank 0 prints where each one is, and the devices its launcher shows it."""

from __future__ import annotations

import os

import hpctrain

VARIABLE = "CUDA_VISIBLE_DEVICES"


def main() -> None:
    shown = os.environ.get(VARIABLE)
    with hpctrain.connect() as world:
        topology = world.topology
        assert os.environ.get(VARIABLE) == shown
        place = f"{topology.rank} {topology.host} {topology.local_rank} {shown}"
        places = world.communicator.all_gather(place)
        if topology.is_rank_zero:
            print("\n".join(places), flush=True)


if __name__ == "__main__":
    main()
