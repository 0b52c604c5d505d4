"""Memory of a rank stays flat, and within data.buffer_mb, however large the dataset is."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers.loaders import train_loader

from hpctrain.data import open_dataset
from hpctrain.data.order.order import Order

SHARDS, SHARD_ROWS, SHAPE = 8, 200_000, (3, 64, 64)
BATCH = 256
FIRST_BATCHES, MORE_BATCHES = 60, 240
SLACK_BYTES = 48 * 2**20


def resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * 4096


def write_sparse(path: Path, chunks: tuple[int, ...] | None) -> None:
    """Make a file whose 2.5 GB are there for every reader, and take no space on the disk."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    if chunks is not None:
        properties.set_chunk(chunks)
    space = h5py.h5s.create_simple((SHARD_ROWS, *SHAPE))
    with h5py.File(path, "w") as file:
        h5py.h5d.create(file.id, b"x", h5py.h5t.NATIVE_UINT8, space, dcpl=properties)


@pytest.mark.parametrize("chunks", [None, (100, *SHAPE)], ids=["contiguous", "chunked"])
def test_twenty_gigabytes(tmp_path: Path, chunks: tuple[int, ...] | None) -> None:
    for number in range(SHARDS):
        write_sparse(tmp_path / f"{number}.h5", chunks)
    dataset = open_dataset(str(tmp_path))
    assert dataset.samples * dataset.bytes_per_sample > 19e9
    assert sum(path.stat().st_blocks for path in tmp_path.iterdir()) * 512 < 10e6
    before = resident_bytes()
    order = Order.for_dataset(dataset, seed=0, global_batch_size=BATCH)
    loader = train_loader(
        dataset,
        order,
        fields=["x"],
        global_batch_size=BATCH,
        drop_last=True,
        buffer_mb=256.0,
        threads=2,
    )
    seen: list[int] = []
    for number, batch in zip(range(FIRST_BATCHES + MORE_BATCHES), loader.epoch(0), strict=False):
        assert batch.size == BATCH
        if number >= FIRST_BATCHES:
            seen.append(resident_bytes())
    loader.close()
    assert max(seen) - seen[0] < SLACK_BYTES, np.diff(seen).tolist()
    assert max(seen) - before < loader.buffer_bytes + SLACK_BYTES
    assert loader.buffer_bytes <= 256e6
