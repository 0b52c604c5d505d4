"""Every rank writes its own samples to one dataset; the shards are those of one writer."""

from __future__ import annotations

import sys
from pathlib import Path

import h5py
import numpy as np

import hpctrain
from hpctrain.data import Writer, open_dataset
from hpctrain.data.files.index import damaged_shards
from hpctrain.errors import DatasetError

SHARES = (5, 0, 7, 4)
"""Samples of each rank; one has none."""


def main(folder: Path) -> None:
    with hpctrain.connect() as world:
        rank, size = world.topology.rank, world.topology.world_size
        communicator = world.communicator
        begin = sum(SHARES[:rank])
        with Writer(folder / "whole", shard_rows=3, communicator=communicator) as writer:
            for number in range(begin, begin + SHARES[rank]):
                writer.append({"x": np.full(2, number), "rank": rank})
        dataset = open_dataset(str(folder / "whole"))
        assert dataset.samples == sum(SHARES[:size])
        assert not damaged_shards(dataset)
        values = []
        for shard in dataset.shards:
            with h5py.File(shard.path) as file:
                values += file["x"][:, 0].tolist()
        assert values == list(range(dataset.samples))

        with Writer(folder / "ragged", ragged=["x"], communicator=communicator) as writer:
            for number in range(begin, begin + SHARES[rank]):
                writer.append({"x": np.full(number % 3 + 1, number)})
        expected = [number for number in range(sum(SHARES[:size])) for _ in range(number % 3 + 1)]
        values = []
        for shard in open_dataset(str(folder / "ragged")).shards:
            with h5py.File(shard.path) as file:
                values += file["x"][()].tolist()
        assert values == expected

        # What does not fit together, and what is in the way, is told to all ranks.
        def write(name: str, value: object) -> str:
            try:
                with Writer(folder / name, communicator=communicator) as writer:
                    if value is not None:
                        writer.append({"x": value})
            except DatasetError as error:
                assert error.everywhere
                return str(error)
            return ""

        assert "there is a dataset" in write("whole", 1)
        assert "no sample was written" in write("empty", None)
        different = write("different", 1.5 if rank else 1)
        assert "rank 1 wrote x float64" in different
        assert not (folder / "different" / "index.json").exists()
        assert not list((folder / "empty").glob("*.h5"))
        if rank == 0:
            print("passed", size)


main(Path(sys.argv[1]))
