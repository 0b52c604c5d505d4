"""Ranks fill one memory of their node, and serve from it the batches that files would give."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

import hpctrain
from hpctrain.data import Storage, Writer, open_dataset
from hpctrain.data.loading.loader import LoaderOptions, TrainLoader
from hpctrain.data.order.batches import Batching, Epochs, RankShare
from hpctrain.data.order.order import Order
from hpctrain.data.staging.node_cache import SHARED, hold_on_node
from hpctrain.errors import DatasetError, HpctrainError

SAMPLES = 1001


def main(folder: Path) -> None:
    with hpctrain.connect() as world:
        rank, size = world.topology.rank, world.topology.world_size
        communicator = world.communicator
        if world.topology.is_rank_zero:
            images = np.random.default_rng(0).integers(0, 256, (SAMPLES, 3, 5), np.uint8)
            storage = Storage("gzip", chunk_bytes=300)
            with Writer(folder / "data", shard_rows=200, storage=storage) as writer:
                writer.extend({"image": images, "id": np.arange(SAMPLES)})
        communicator.barrier()
        dataset = open_dataset(str(folder / "data"))
        before = {path.name for path in SHARED.glob("hpctrain-*")}
        memory = hold_on_node(dataset, world.topology, communicator, threads=2)
        communicator.barrier()
        assert {path.name for path in SHARED.glob("hpctrain-*")} <= before, "something is left"

        order = Order.for_dataset(dataset, seed=1, global_batch_size=50, is_resident=True)
        assert order.block_rows == 1

        def batches(held: object) -> list[bytes]:
            loader = TrainLoader(
                dataset,
                Epochs(order, "data", Batching(global_batch_size=50), RankShare(rank, size)),
                LoaderOptions(device=torch.device("cpu"), buffer_mb=1.0),
                fields=["image", "id"],
                memory=held,  # type: ignore[arg-type]
            )
            found = [
                b"".join(t.numpy().tobytes() for t in b.fields.values()) for b in loader.epoch(3)
            ]
            loader.close()
            return found

        assert batches(memory) == batches(None)

        # A file that one of the ranks cannot read is told to all.
        communicator.barrier()
        if world.topology.is_rank_zero:
            (folder / "data" / "shard-000004.h5").unlink()
        communicator.barrier()
        told: HpctrainError | None = None
        try:
            hold_on_node(dataset, world.topology, communicator, retries=0)
        except DatasetError as error:
            told = error
        assert told is not None
        assert told.everywhere
        assert "shard-000004.h5" in str(told)
        communicator.barrier()
        assert {path.name for path in SHARED.glob("hpctrain-*")} <= before, "something is left"
        if world.topology.is_rank_zero:
            print("passed", size)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
