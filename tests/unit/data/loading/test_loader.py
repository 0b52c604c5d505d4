"""Batches of tensors: the right samples, in the one order, in memory that stays theirs."""

from __future__ import annotations

import gc
import itertools
import logging
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import xxhash
from helpers.loaders import evaluation_loader, train_loader

from hpctrain.data import Writer, open_dataset
from hpctrain.data import random as random_of_samples
from hpctrain.data.dataset import Dataset
from hpctrain.data.loading.batch_transform import BatchTransform, Scale
from hpctrain.data.loading.loader import Batch, TrainLoader
from hpctrain.data.order.batches import Begun
from hpctrain.data.order.epochs import Epoch, plan_epoch
from hpctrain.data.order.order import Order
from hpctrain.data.order.state import from_state, to_state
from hpctrain.errors import ConfigError, DatasetError

CPU = torch.device("cpu")
SAMPLES = 1001
IMAGES = np.random.default_rng(0).integers(0, 256, (SAMPLES, 3, 5), np.uint8)
IDS = np.arange(SAMPLES, dtype=np.int64)
# One row a block; whole blocks in windows; a single block a lane.
ORDERS = [
    Order(samples=SAMPLES, seed=3, lanes=16, window=4, block_rows=1),
    Order(samples=SAMPLES, seed=3, lanes=16, window=2, block_rows=6),
    Order(samples=SAMPLES, seed=3, lanes=12, window=4, block_rows=200),
    Order(samples=SAMPLES, seed=3, lanes=12, window=4, block_rows=1, sampling="sequential"),
]
in_every_order = pytest.mark.parametrize(
    "order", ORDERS, ids=["rows", "windows", "blocks", "sequential"]
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("loader") / "data"
    with Writer(folder, shard_bytes=300 * 23) as writer:
        writer.extend({"image": IMAGES, "id": IDS})
    return open_dataset(str(folder))


def reader_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "hpctrain-reader"]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    if reader_threads():
        gc.collect()
    assert reader_threads() == []


def make(dataset: Dataset, order: Order, **changes: Any) -> TrainLoader:
    arguments = {
        "fields": ["image", "id"],
        "global_batch_size": 64,
    }
    return train_loader(dataset, order, **(arguments | changes))


def global_batches(
    dataset: Dataset, order: Order, world_size: int, start: int = 0, **changes: Any
) -> dict[int, str]:
    """Return a hash of each global batch of an epoch, put together of all ranks, by position."""
    parts: dict[int, list[tuple[int, bytes]]] = {}
    for rank in range(world_size):
        loader = make(dataset, order, rank=rank, world_size=world_size, **changes)
        for batch in loader.epoch(1, start):
            part = parts.setdefault(batch.start, [])
            rows = batch.fields["image"].numpy()
            ids = batch.fields["id"].tolist()
            assert len(rows) == len(ids) == batch.size <= loader.largest_share
            part += [(i, row.tobytes()) for i, row in zip(ids, rows, strict=True)]
        loader.close()
    return {s: xxhash.xxh3_64_hexdigest(repr(sorted(part)).encode()) for s, part in parts.items()}


@in_every_order
def test_batches_begin_at_the_same_alignment_wherever_reading_began(
    dataset: Dataset, order: Order
) -> None:
    """Matrix products sum in another order elsewhere: a run that goes on would differ a bit."""
    assert IMAGES[0].nbytes * 21 % 64  # shares of a third are of an odd length
    for start in (0, 64, 3 * 64):
        loader = make(dataset, order, rank=1, world_size=3)
        for batch in loader.epoch(0, start):
            for tensor in batch.fields.values():
                assert tensor.data_ptr() % 64 == 0
        loader.close()


@in_every_order
def test_every_sample_once_in_the_order(dataset: Dataset, order: Order) -> None:
    loader = make(dataset, order)
    for epoch in (0, 1):
        batches = list(loader.epoch(epoch))
        assert [batch.start for batch in batches] == list(range(0, SAMPLES, 64))
        assert [batch.global_size for batch in batches] == [64] * 15 + [41]
        assert {batch.epoch for batch in batches} == {epoch}
        ids = torch.cat([batch.fields["id"] for batch in batches])
        if order.block_rows > 1 or epoch == 0:
            expected = plan_epoch(order, epoch).rows(np.arange(SAMPLES))
            assert ids.tolist() == expected.tolist()
        assert sorted(ids.tolist()) == IDS.tolist()
        images = torch.cat([batch.fields["image"] for batch in batches])
        assert (images.numpy() == IMAGES[ids.numpy()]).all()
    assert loader.wait_seconds > 0
    loader.close()


@in_every_order
def test_the_same_global_batches_at_any_world_size(dataset: Dataset, order: Order) -> None:
    expected = global_batches(dataset, order, 1)
    for world_size in (2, 3, 4, 5, 6, 7, 8, 12):
        assert global_batches(dataset, order, world_size) == expected


@in_every_order
def test_the_same_global_batches_with_a_small_buffer(
    dataset: Dataset, order: Order, caplog: pytest.LogCaptureFixture
) -> None:
    expected = global_batches(dataset, order, 2)
    assert not caplog.records
    assert global_batches(dataset, order, 2, buffer_mb=0.004) == expected
    told = [r.getMessage() for r in caplog.records if "holds no window of every lane" in r.msg]
    assert len(told) == (0 if order.block_rows == 1 else 2)  # one on each rank


def test_in_memory_a_sequential_order_is_the_same(dataset: Dataset) -> None:
    memory = {
        "image": IMAGES.reshape(SAMPLES, -1),
        "id": IDS.view(np.uint8).reshape(SAMPLES, -1),
    }
    order = ORDERS[-1]
    expected = global_batches(dataset, order, 1)
    assert global_batches(dataset, order, 3, memory=memory) == expected


@in_every_order
def test_restart_anywhere(dataset: Dataset, order: Order) -> None:
    expected = global_batches(dataset, order, 1)
    draw = random.Random(1)
    for start in draw.sample(range(0, SAMPLES, 64), 5):
        rest = {position: each for position, each in expected.items() if position >= start}
        assert global_batches(dataset, order, draw.choice([1, 2, 3, 5]), start) == rest


def augment(
    *, fields: dict[str, torch.Tensor], keys: torch.Tensor, training: bool
) -> dict[str, torch.Tensor]:
    noise = random_of_samples.normal(keys, 3, 5).float()
    flip = random_of_samples.uniform(keys, stream=1) < 0.5
    image = fields["image"] + (noise if training else 0.0)
    image[flip] = image[flip].flip(-1)
    return {**fields, "image": image}


def batch_transform(dataset: Dataset) -> BatchTransform:
    scale = Scale.of(dataset.fields, "image", [100.0, 120.0, 130.0], [60.0, 70.0, 73.0], CPU)
    return BatchTransform({"image": scale}, augment, ("image", "id"))


@in_every_order
def test_the_same_finished_batches_at_any_world_size_and_after_restarts(
    dataset: Dataset, order: Order
) -> None:
    finished = batch_transform(dataset)
    expected = global_batches(dataset, order, 1, batch_transform=finished)
    assert expected != global_batches(dataset, order, 1)
    for world_size in (2, 3, 4):
        assert global_batches(dataset, order, world_size, batch_transform=finished) == expected
    assert global_batches(dataset, order, 2, buffer_mb=0.004, batch_transform=finished) == expected
    for start, world_size in ((64, 3), (448, 1), (960, 2)):
        rest = {position: each for position, each in expected.items() if position >= start}
        assert global_batches(dataset, order, world_size, start, batch_transform=finished) == rest


def test_what_is_drawn_in_an_evaluation_is_the_same_every_time(dataset: Dataset) -> None:
    def evaluate(batch_size: int, world_size: int) -> torch.Tensor:
        images = []
        for rank in range(world_size):
            loader = evaluation_loader(
                dataset,
                fields=["image", "id"],
                rank=rank,
                world_size=world_size,
                batch_size=batch_size,
                batch_transform=batch_transform(dataset),
                seed=3,
            )
            for _ in range(2):
                epoch = torch.cat([batch.fields["image"] for batch in loader])
            images.append(epoch)
            loader.close()
        return torch.cat(images)

    expected = evaluate(100, 1)
    assert torch.equal(evaluate(7, 1), expected)
    assert torch.equal(evaluate(64, 3), expected)
    unflipped = (
        BatchTransform(batch_transform(dataset).scales).scales["image"].apply(torch.tensor(IMAGES))
    )
    changed = (expected != unflipped).flatten(1).any(1).float().mean()
    assert 0.4 < changed < 0.6  # flipped, and without noise


@in_every_order
def test_other_batch_sizes_in_mid_epoch(dataset: Dataset, order: Order) -> None:
    seen: list[int] = []
    for start, stop, size, world_size in [(0, 200, 50, 1), (200, 300, 100, 3), (300, None, 7, 1)]:
        parts: dict[int, list[int]] = {}
        for rank in range(world_size):
            loader = make(dataset, order, global_batch_size=size, rank=rank, world_size=world_size)
            for batch in itertools.takewhile(
                lambda b, stop=stop: stop is None or b.start < stop, loader.epoch(0, start)
            ):
                parts.setdefault(batch.start, []).extend(batch.fields["id"].tolist())
            loader.close()
        seen += [i for start in sorted(parts) for i in parts[start]]
    assert len(seen) == SAMPLES
    assert sorted(seen) == IDS.tolist()


def test_fewer_samples_than_lanes_and_ranks(tmp_path: Path) -> None:
    with Writer(tmp_path / "data") as writer:
        writer.extend({"image": IMAGES[:3], "id": IDS[:3]})
    small = open_dataset(str(tmp_path / "data"))
    order = Order.for_dataset(small, seed=1, global_batch_size=2)
    assert order.lanes == 64
    expected = global_batches(small, order, 1, global_batch_size=2)
    assert len(expected) == 2
    assert global_batches(small, order, 5, global_batch_size=2) == expected
    batch = next(make(small, order, global_batch_size=2, rank=4, world_size=5).epoch(0))
    assert (batch.size, batch.global_size) == (0, 2)
    assert batch.fields["image"].shape == (0, 3, 5)
    assert batch.fields["image"].dtype == torch.uint8


@pytest.mark.parametrize(("samples", "batch"), [(1001, 1000), (1001, 250), (1001, 100)], ids=str)
def test_last_batch_of_one_sample(dataset: Dataset, samples: int, batch: int) -> None:
    """All ranks see it, most of them without a share."""
    sizes = []
    for rank in range(3):
        loader = make(dataset, ORDERS[1], global_batch_size=batch, rank=rank, world_size=3)
        *_, last = loader.epoch(0)
        assert (last.start, last.global_size) == (samples - 1, 1)
        sizes.append(last.size)
    assert sorted(sizes) == [0, 0, 1]


def test_drop_last(dataset: Dataset) -> None:
    loader = make(dataset, ORDERS[0], drop_last=True)
    assert loader.epoch_size == 960
    assert [batch.global_size for batch in loader.epoch(0)] == [64] * 15
    # Begun with another batch size: the epoch ends where every other does.
    assert [b.global_size for b in loader.epoch(0, 900)] == [60]
    assert make(dataset, ORDERS[0]).epoch_size == SAMPLES


def test_resume_with_other_lanes_takes_effect_at_the_next_epoch(dataset: Dataset) -> None:
    begun, wanted = ORDERS[1], ORDERS[2]
    whole = [batch.fields["id"].tolist() for batch in make(dataset, begun).epoch(4)]
    state = to_state(begun, 4, 128, dataset.fingerprint)
    order, epoch, position = from_state(state, dataset, wanted, SAMPLES)
    loader = make(dataset, wanted, begun=Begun(orders={epoch: order}))
    assert [b.fields["id"].tolist() for b in loader.epoch(epoch, position)] == whole[2:]
    assert loader.order_of(4) == begun
    assert loader.order_of(5) == wanted
    ids = torch.cat([batch.fields["id"] for batch in loader.epoch(5)])
    assert ids.tolist() == Epoch(wanted, 5).rows(np.arange(SAMPLES)).tolist()


@in_every_order
def test_batches_may_be_kept(dataset: Dataset, order: Order) -> None:
    """Their memory is not written again while anything refers to it, were it only a view."""
    loader = make(dataset, order)
    kept: list[Batch] = []
    views = []
    for batch in itertools.chain(loader.epoch(0), loader.epoch(1)):
        kept.append(batch)
        views.append(loader.example()["image"][0, 1:])
    ids = torch.cat([batch.fields["id"] for batch in kept])
    images = torch.cat([batch.fields["image"] for batch in kept])
    assert (images.numpy() == IMAGES[ids.numpy()]).all()
    assert all((view.numpy() == IMAGES[0, 1:]).all() for view in views)
    loader.close()


def test_memory_is_used_again(dataset: Dataset) -> None:
    loader = make(dataset, ORDERS[1], global_batch_size=100, buffer_mb=0.03)
    addresses = {
        batch.fields["image"].untyped_storage().data_ptr()
        for epoch in range(4)
        for batch in loader.epoch(epoch)
    }
    assert len(addresses) < 12  # of 44 batches
    assert loader.buffer_bytes <= 30_000


def test_example(dataset: Dataset) -> None:
    rows = []
    for rank in range(3):
        example = make(dataset, ORDERS[0], rank=rank, world_size=3).example()
        assert example["image"].shape == (1, 3, 5)
        rows.append(int(example["id"]))
        assert (example["image"][0].numpy() == IMAGES[rows[-1]]).all()
    assert rows == [0, 333, 667]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 100, 5000])
def test_evaluation_sees_every_sample_once(
    dataset: Dataset, world_size: int, batch_size: int
) -> None:
    ids: list[int] = []
    for rank in range(world_size):
        loader = evaluation_loader(
            dataset,
            fields=["id", "image"],
            rank=rank,
            world_size=world_size,
            batch_size=batch_size,
            buffer_mb=1,
        )
        for _ in range(2):
            batches = list(loader)
            assert len(batches) == len(loader)
        for batch in batches:
            assert batch.global_size == SAMPLES
            assert 0 < batch.size <= batch_size
            assert batch.fields["id"][0] == batch.start
            found = batch.fields["id"].numpy()
            assert (batch.fields["image"].numpy() == IMAGES[found]).all()
            ids += found.tolist()
    assert ids == IDS.tolist()


def test_evaluation_of_fewer_samples_than_ranks(tmp_path: Path) -> None:
    with Writer(tmp_path / "data") as writer:
        writer.extend({"id": IDS[:2]})
    small = open_dataset(str(tmp_path / "data"))
    counts = []
    for rank in range(4):
        loader = evaluation_loader(
            small,
            fields=["id"],
            rank=rank,
            world_size=4,
            batch_size=8,
            buffer_mb=1,
        )
        counts.append(sum(batch.size for batch in loader))
        assert len(loader) == counts[-1]
    assert sum(counts) == 2


@pytest.mark.parametrize(
    "dtype",
    [
        *("bool", "uint8", "int8", "int16", ">i4", "int64", "uint16", ">u2", "uint32", "uint64"),
        *("float16", ">f4", "float64", "complex64", ">c16"),
    ],
)
@pytest.mark.parametrize(
    "options",
    [{}, {"chunks": (7, 2)}, {"chunks": (7, 2), "compression": "lzf"}],
    ids=["contiguous", "chunked", "lzf"],
)
def test_dtypes_and_byte_orders(
    tmp_path: Path, dtype: str, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    values = (np.arange(60).reshape(20, 3) * 1021).astype(dtype)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=values, **options)
    plain = open_dataset(str(tmp_path))
    order = Order(samples=20, seed=1, lanes=2, window=2, block_rows=3)
    loader = make(plain, order, fields=["x"], global_batch_size=20)
    (batch,) = loader.epoch(0)
    native = values.astype(values.dtype.newbyteorder("="))
    assert batch.fields["x"].dtype == torch.from_numpy(native).dtype
    expected = native[Epoch(order, 0).rows(np.arange(20))]
    assert (batch.fields["x"].numpy() == expected).all()
    assert [r for r in caplog.records if r.levelno == logging.WARNING] == []


def test_what_only_hdf5_reads_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["stored"] = np.arange(20)
        layout = h5py.VirtualLayout((20,), "i8")
        layout[:] = h5py.VirtualSource(".", "stored", (20,))
        file.create_virtual_dataset("x", layout)
    order = Order(samples=20, seed=1, lanes=2, window=2, block_rows=3)
    loader = make(open_dataset(str(tmp_path), ["x"]), order, fields=["x"], global_batch_size=20)
    (batch,) = loader.epoch(0)
    assert sorted(batch.fields["x"].tolist()) == list(range(20))
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert told == ['field "x" is read through HDF5, which is slower: it is virtual in a.h5']


def test_what_cannot_be_is_refused_before_anything_is_read(dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match=r"data\.lanes = 16, but there are 17 ranks"):
        make(dataset, ORDERS[0], world_size=17)
    with pytest.raises(ConfigError, match=r"epoch 0 was begun with 12 lanes .*start at most 12"):
        make(dataset, ORDERS[0], world_size=13, begun=Begun(orders={0: ORDERS[2]}))
    with pytest.raises(DatasetError, match=r"global_batch_size = 1002, but .* only 1001 samples"):
        make(dataset, ORDERS[0], global_batch_size=1002)
    with pytest.raises(DatasetError, match=r'no field "images"\. Did you mean "image"'):
        make(dataset, ORDERS[0], fields=["images"])


def test_errors_of_the_thread_reach_the_consumer(tmp_path: Path) -> None:
    with Writer(tmp_path / "data", shard_bytes=100 * 8) as writer:
        writer.extend({"id": IDS})
    broken = open_dataset(str(tmp_path / "data"))
    (tmp_path / "data" / "shard-000004.h5").unlink()
    loader = make(broken, ORDERS[1], fields=["id"])
    with pytest.raises(DatasetError, match=r'shard-000004\.h5: field "id", row \d+: No such file'):
        list(loader.epoch(0))


def test_an_epoch_left_in_the_middle_ends_its_thread(dataset: Dataset) -> None:
    loader = make(dataset, ORDERS[1], buffer_mb=0.02)
    first = loader.epoch(0)
    next(first)
    # Another epoch ends the one before.
    second = loader.epoch(1)
    next(second)
    assert len(list(first)) < 15
    loader.close()
    assert reader_threads() == []
    next(loader.epoch(0))  # can be used again


def test_order_is_chosen_from_data_and_batch_alone(dataset: Dataset) -> None:
    order = Order.for_dataset(dataset, seed=9, global_batch_size=100)
    assert order == Order(samples=SAMPLES, seed=9, lanes=128, window=4, block_rows=1)
    chosen = Order.for_dataset(dataset, seed=9, global_batch_size=100, lanes=4, window=2)
    assert chosen == Order(samples=SAMPLES, seed=9, lanes=4, window=2, block_rows=15)
