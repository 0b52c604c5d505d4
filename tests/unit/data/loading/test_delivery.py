"""Batches that a device copies beside its work: on a stand-in that copies as late as it can."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.loaders import train_loader
from helpers.waiting import wait_for
from torch import Tensor

from hpctrain.accelerator import Streams
from hpctrain.data import Writer, open_dataset
from hpctrain.data.dataset import Dataset, Field
from hpctrain.data.loading.batch_transform import BatchTransform
from hpctrain.data.loading.device_copies import MOST_COPIES, DeviceCopies
from hpctrain.data.loading.loader import TrainLoader
from hpctrain.data.loading.prefetch import (
    BufferPool,
    MemoryPlan,
    new_bytes,
    power_of_two,
    slabs_in_powers_of_two,
)
from hpctrain.data.order.order import Order

SAMPLES = 600
IDS = np.arange(SAMPLES, dtype=np.int64)
CPU = torch.device("cpu")


class Late:
    """An event; what was to be done before it is done when somebody asks for it."""

    def __init__(self, work: list[Callable[[], object]]) -> None:
        self.work = work

    def query(self) -> bool:
        return not self.work

    def synchronize(self) -> None:
        while self.work:
            self.work.pop(0)()


class Stream:
    """A stream of the stand-in."""

    def __init__(self) -> None:
        self.work: list[Callable[[], object]] = []

    def wait_event(self, event: Late) -> None:
        event.synchronize()


class LateStreams(Streams):
    """Streams of a device on which nothing happens before somebody waits for it.

    Attributes:
        lent: how often memory was lent to another stream.
    """

    def __init__(self) -> None:
        self.device = CPU
        self.work = Stream()
        self._now = self.work
        self.made = 0
        self.lent = 0
        self.waiting = 0
        self.most_waiting = 0

    def new(self) -> Stream:
        self.made += 1
        return Stream()

    def current(self) -> Stream:
        return self._now

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self._now = self._now, stream
        yield
        self._now = before

    def mark(self, stream: Stream) -> Late:
        work, stream.work = stream.work, []
        self.waiting += 1
        self.most_waiting = max(self.most_waiting, self.waiting)
        work.append(self._done)
        return Late(work)

    def _done(self) -> None:
        self.waiting -= 1

    def pinned(self, tensor: Tensor) -> Tensor:
        return tensor

    def copied(self, tensor: Tensor) -> Tensor:
        assert self._now is not self.work, "a copy in the way of the work"
        made = torch.full_like(tensor, 77)
        self._now.work.append(functools.partial(made.copy_, tensor))
        return made

    def lend(self, tensor: Tensor, stream: Stream) -> None:
        assert stream is self._now
        self.lent += 1


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder: Path = tmp_path_factory.mktemp("copies") / "data"
    with Writer(folder) as writer:
        writer.extend({"id": IDS, "wide": np.repeat(IDS[:, None].astype(np.float32), 9, axis=1)})
    return open_dataset(str(folder))


def loader_on(
    streams: Streams, dataset: Dataset, buffer_mb: float, **changes: object
) -> TrainLoader:
    order = Order(samples=SAMPLES, seed=3, lanes=16, window=4, block_rows=1)
    loader = train_loader(
        dataset,
        order,
        fields=["id", "wide"],
        global_batch_size=16,
        buffer_mb=buffer_mb,
        **changes,
    )
    loader._delivery._copies = DeviceCopies(streams)
    return loader


def drawing(*, fields: dict[str, Tensor], keys: Tensor, training: bool) -> dict[str, Tensor]:
    return {**fields, "drawn": (keys.view(torch.int64) % 1000).clone()}


@pytest.mark.parametrize("buffer_mb", [0.002, 64.0])
@pytest.mark.parametrize("keeps", [0, 5])
def test_batches_are_whole_however_late_copies_come(
    dataset: Dataset, buffer_mb: float, keeps: int
) -> None:
    """With tiny buffers too, and a consumer that holds on to batches."""
    streams = LateStreams()
    batch_transform = BatchTransform(transform=drawing)
    expected = list(_plain(dataset, batch_transform))
    loader = loader_on(streams, dataset, buffer_mb, batch_transform=batch_transform)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    found = []
    for batch in loader.epoch(0):
        kept.append((batch.fields["id"], batch.fields["wide"], batch.fields["drawn"]))
        if len(kept) > keeps:
            found.append([each.clone() for each in kept.pop(0)])
    found += [list(each) for each in kept]
    loader.close()
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert streams.made == 1, "one stream for all copies"
    assert streams.most_waiting <= MOST_COPIES
    assert streams.lent > 0


def _plain(dataset: Dataset, batch_transform: BatchTransform) -> Iterator[list[Tensor]]:
    loader = loader_on(LateStreams(), dataset, 64.0, batch_transform=batch_transform)
    loader._delivery._copies = None
    for batch in loader.epoch(0):
        yield [batch.fields[name].clone() for name in ("id", "wide", "drawn")]
    loader.close()


def test_without_the_order_of_streams_they_are_not(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in would show it: nothing of a copy is there by chance."""
    monkeypatch.setattr(Stream, "wait_event", lambda self, event: None)
    loader = loader_on(LateStreams(), dataset, 64.0)
    first = next(iter(loader.epoch(0)))
    assert (first.fields["id"] == 77).all()
    loader.close()


def test_the_next_group_is_on_its_way_while_the_consumer_works(dataset: Dataset) -> None:
    streams = LateStreams()
    loader = loader_on(streams, dataset, 0.03)
    assert 1 < loader._group_batches < 20, "several groups of several batches"
    ahead = 0
    for _ in loader.epoch(0):
        # Of a stand-in that copies when it has to: what still waits was begun before its turn.
        ahead += streams.waiting > 0
        assert loader._delivery._running is not None
        channel = loader._delivery._running._channel
        wait_for(functools.partial(_is_there_or_over, channel))
    loader.close()
    assert ahead > 0


def _is_there_or_over(channel: Any) -> bool:
    return bool(channel._items) or channel._closed


def test_a_consumer_may_change_its_stream_within_a_group(dataset: Dataset) -> None:
    streams = LateStreams()
    loader = loader_on(streams, dataset, 64.0)
    batches = loader.epoch(0)
    next(batches)
    lent = streams.lent
    with streams.on(Stream()):
        next(batches)
    loader.close()
    assert streams.lent == 2 * lent


@pytest.mark.parametrize("group_bytes", [1, 10, 4096, 5000, 10**7, 2**24, 2**24 + 1])
@pytest.mark.parametrize("groups", [1, 2, 5, 7, 8, 40])
def test_pieces_in_powers_of_two(groups: int, group_bytes: int) -> None:
    pieces = slabs_in_powers_of_two(groups, group_bytes)
    taken = sum(power_of_two(each * group_bytes) for each in pieces)
    assert sum(pieces) == groups
    assert taken <= groups * power_of_two(group_bytes)
    if groups <= 16:
        assert taken <= power_of_two(groups * group_bytes)
    pool = BufferPool(
        {"x": Field((group_bytes,), np.dtype("u1"))}, 1, groups, new_bytes, in_powers_of_two=True
    )
    assert pool.surplus_bytes == taken - groups * group_bytes


def test_a_plan_counts_the_groups_that_are_copied() -> None:
    plain = MemoryPlan.make(10**6, 512.0, batches=1000)
    copied = MemoryPlan.make(10**6, 512.0, batches=1000, in_use=4)
    assert copied.groups_ready == plain.groups_ready + 1
    assert copied.total <= 512e6
