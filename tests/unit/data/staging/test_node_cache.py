"""Data in a node's memory: who reads what, what fits, and that nothing stays behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hpctrain.data import Storage, Writer, open_dataset
from hpctrain.data.dataset import Dataset
from hpctrain.data.order.epochs import Epoch
from hpctrain.data.order.order import Order, resident_block_rows
from hpctrain.data.staging import node_cache
from hpctrain.data.staging.node_cache import (
    SHARED,
    hold_on_node,
    host_memory,
    plan,
    require_room,
    share,
)
from hpctrain.errors import ConfigError
from hpctrain.launch.communicators import SingleCommunicator
from hpctrain.topology import Topology

SAMPLES = 101
ALONE = Topology(
    rank=0,
    world_size=1,
    local_rank=0,
    local_world_size=1,
    node_rank=0,
    num_nodes=1,
    hosts=("here",),
    launcher="none",
)


def write(folder: Path, storage: Storage | None = None) -> Dataset:
    with Writer(folder / "data", shard_rows=40, storage=storage) as writer:
        writer.extend({"x": np.arange(SAMPLES * 3.0).reshape(-1, 3), "y": np.arange(SAMPLES)})
    return open_dataset(str(folder / "data"))


def left_behind() -> set[str]:
    return {path.name for path in SHARED.glob("hpctrain-*")}


@pytest.mark.parametrize("storage", [None, Storage("gzip", chunk_bytes=100)], ids=str)
def test_values(tmp_path: Path, storage: Storage | None) -> None:
    before = left_behind()
    dataset = write(tmp_path, storage)
    held = hold_on_node(dataset, ALONE, SingleCommunicator())
    assert left_behind() <= before
    assert (held["x"].view(np.float64) == np.arange(SAMPLES * 3.0).reshape(-1, 3)).all()
    assert (held["y"].view(np.int64).ravel() == np.arange(SAMPLES)).all()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 50])
def test_every_row_is_read_by_one_rank(tmp_path: Path, ranks: int) -> None:
    dataset = write(tmp_path, Storage("gzip", chunk_bytes=100))
    shares = [share(dataset, rank, ranks) for rank in range(ranks)]
    assert [row for rows in shares for row in rows] == list(range(SAMPLES))
    assert all(rows.start % dataset.chunk_rows == 0 for rows in shares)


def test_fields_do_not_overlap(tmp_path: Path) -> None:
    places, size = plan(write(tmp_path))
    assert places == {"x": (0, SAMPLES * 24), "y": (4096, SAMPLES * 8)}
    assert size == 8192


@pytest.mark.parametrize(
    ("free", "shared", "place"),
    [(10**9, 10**12, "this job's memory on the node"), (10**12, 10**9, "/dev/shm")],
)
def test_what_does_not_fit_is_a_mistake_of_the_config(
    monkeypatch: pytest.MonkeyPatch, free: int, shared: int, place: str
) -> None:
    monkeypatch.setattr(node_cache, "host_memory", lambda: (free, 10**13))
    monkeypatch.setattr(node_cache, "shared_memory", lambda: shared)
    require_room(9 * 10**8, "data/train")
    with pytest.raises(
        ConfigError,
        match=f'data.cache = "memory": data/train takes 5.0 GB on every node, and {place} has '
        '1.0 GB free: ask for more memory, or set data.cache = "none"',
    ):
        require_room(5 * 10**9, "data/train")


def test_no_room_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = left_behind()
    monkeypatch.setattr(node_cache.os, "posix_fallocate", refuse)
    with pytest.raises(ConfigError, match=r"No space left on device; set data\.cache"):
        hold_on_node(write(tmp_path), ALONE, SingleCommunicator())
    assert left_behind() <= before


def test_free_memory_is_part_of_all() -> None:
    free, total = host_memory()
    assert 0 < free <= total


@pytest.mark.parametrize(
    ("samples", "rows"), [(1, 1), (2**19, 1), (2**19 + 1, 2), (10**7, 20), (10**12, 1907349)]
)
def test_the_plan_of_an_epoch_stays_small(samples: int, rows: int) -> None:
    assert resident_block_rows(samples) == rows
    order = Order(samples=samples, seed=0, lanes=64, window=4, block_rows=rows)
    assert order.num_blocks <= 2**19


def test_small_data_are_shuffled_row_by_row(tmp_path: Path) -> None:
    dataset = write(tmp_path, Storage("gzip", chunk_bytes=1000))
    order = Order.for_dataset(dataset, seed=0, global_batch_size=8, is_resident=True)
    rows = Epoch(order, 0).rows(np.arange(SAMPLES))
    assert order.block_rows == 1
    assert sorted(rows.tolist()) == list(range(SAMPLES))
