"""Batches of tensors, on the device: what training iterates over."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hpctrain.data.arrays import Bytes, Int64s
from hpctrain.data.dataset import Dataset
from hpctrain.data.decoding import decoded_rows
from hpctrain.data.loading.batch import Batch, Samples, repeated
from hpctrain.data.loading.batch_transform import BatchTransform
from hpctrain.data.loading.decoder import Decoding
from hpctrain.data.loading.delivery import (
    Delivery,
    LoaderOptions,
    Preparation,
    groups_in_use,
    sample_bytes,
)
from hpctrain.data.loading.prefetch import MemoryPlan
from hpctrain.data.loading.ragged import RaggedBatch
from hpctrain.data.loading.sources import (
    BlockSource,
    Group,
    MemorySource,
    RowSource,
    Source,
    group_bounds,
)
from hpctrain.data.order.epochs import Draw, Epoch, Epochs, MixedEpoch
from hpctrain.data.order.order import Order
from hpctrain.data.order.read_ahead import Ahead, LaneWindows, MixedRounds, RowStream
from hpctrain.data.reading.rows import read_rows
from hpctrain.data.view import View

__all__ = ["Batch", "LoaderOptions", "TrainLoader"]


class TrainLoader:
    """Serves the epochs of a dataset, in an order that does not depend on the number of ranks.

    One epoch at a time: to start one ends the one before. A thread reads ahead, and ends with the
    epoch, with the iterator, and with the loader.

    Attributes:
        epoch_size: samples of all ranks that an epoch serves.
        largest_share: the most samples of any rank in any full batch.
        smallest_share: the fewest of any rank in any batch that begins where one ends.
        largest_pass: samples of a pass, where values bound it: as long as the example of each
            rank; None: where they do not.
        order_of: returns the order of an epoch, for the resume state.
        rows: returns which rows of the dataset this rank serves of positions of an epoch.
        buffer_bytes: host memory that reading ahead takes on this rank.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        options: LoaderOptions,
        *,
        fields: Sequence[str],
        global_batch_size: int,
        drop_last: bool,
        rank: int,
        world_size: int,
        begun: Mapping[int, Order] | None = None,
        draw: Draw | None = None,
        limit: float | None = None,
        begin: int = 0,
        memory: Mapping[str, Bytes] | None = None,
        preparation: Preparation | None = None,
        decoding: Decoding | None = None,
        batch_transform: BatchTransform | None = None,
        max_tokens: int | None = None,
        micro_batch_size: int | None = None,
    ) -> None:
        """Prepare; no file is opened yet.

        Args:
            dataset: as opened, the same on all ranks.
            order: of the epochs.
            options: how to read, and where the batches go.
            fields: that batches hold.
            global_batch_size: samples of all ranks in one batch.
            drop_last: leave out the last, smaller batch of an epoch. One that is resumed with
                another batch size ends where any epoch ends, if need be with a smaller batch.
            rank: of this process.
            world_size: number of ranks.
            begun: epochs that began in another order than `order`, and end in it.
            draw: what draws samples by weight, where the order is one of those.
            limit: end epochs after so many batches, as `served_samples` takes it.
            begin: position at which epochs of `begun` go on.
            memory: all samples by field, as `hold_on_node` returns them; None: read the files.
            preparation: what is done to every sample on the host; None: nothing.
            decoding: what is decoded; None: nothing.
            batch_transform: what is done to batches on the device; None: nothing.
            max_tokens: of samples of unequal length, values of a field in a pass; None: any number.
            micro_batch_size: samples of such a pass; None: any number.

        Raises:
            ConfigError: if there are more ranks than lanes.
            DatasetError: if a field is not there, or the batch is larger than the dataset.
        """
        self._dataset = dataset.select(fields)
        self._epochs = epochs = Epochs(
            order,
            dataset.source,
            global_batch_size=global_batch_size,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
            begun=begun,
            draw=draw,
            limit=limit,
            begin=begin,
        )
        self._global_batch_size = global_batch_size
        self._rank = rank
        self._read_retries = options.read_retries
        self._world_size = world_size
        self.epoch_size, self.order_of = epochs.size, epochs.order_of
        self.largest_share, self.smallest_share = epochs.largest_share, epochs.smallest_share
        self.rows = epochs.rows
        ahead = max(each.batches_ahead(global_batch_size) for each in epochs.orders)
        share, staging = sample_bytes(self._dataset, preparation)
        self._memory = memory
        spent = MemoryPlan.make(
            self.largest_share * share,
            options.buffer_mb,
            batches=-(-self.epoch_size // global_batch_size),
            ahead=0 if memory is not None else ahead,
            ahead_share=self.largest_share * self._dataset.bytes_per_sample,
            staging=self.largest_share * staging,
            in_use=groups_in_use(options.device),
        )
        self._windows_fit = spent.windows_fit
        self._group_batches = spent.group_batches
        rows = max(
            each.largest_share_of_group(global_batch_size, spent.group_batches, world_size)
            for each in epochs.orders
        )
        decoding, batch_transform = decoding or Decoding(), batch_transform or BatchTransform()
        self._needs_keys = preparation is not None or batch_transform.needs_keys
        self._decoding = decoding
        self._delivery = Delivery(
            self._dataset,
            rows,
            spent,
            options,
            preparation=preparation,
            decoding=decoding,
            batch_transform=batch_transform,
            training=True,
        )
        self._needs_rows = self._needs_keys or self._delivery.needs_rows
        self.largest_pass: int | None = None
        self._max_tokens, self._micro_batch_size = max_tokens, micro_batch_size
        is_bounded = isinstance(self._dataset, View) and bool(self._dataset.bounded)
        if max_tokens is not None and is_bounded:
            assert isinstance(self._dataset, View)
            self._dataset.require_at_most(max_tokens)
            here = np.full(self.largest_share, self._example_row, np.int64)
            cuts = self._dataset.cut_by_values(here, max_tokens, micro_batch_size)
            # Some pass may be without samples in any step.
            self.largest_pass, self.smallest_share = cuts[0][1], 0
        self.buffer_bytes = spent.total + self._delivery.surplus_bytes

    @property
    def wait_seconds(self) -> float:
        """How long the consumer has waited for batches so far."""
        return self._delivery.wait_seconds

    @property
    def failed_reads(self) -> int:
        """How often a read failed so far, whatever came of it."""
        return self._delivery.access.failed_reads

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch | RaggedBatch]:
        """Yield this rank's share of every global batch of an epoch.

        Args:
            epoch: from 0.
            start: position to start at, 0 to `epoch_size` - 1.

        Raises:
            DatasetError: while iterating, naming file, field and row that cannot be read.
        """
        order = self.order_of(epoch)
        source = self._source(order, epoch, start)
        return self._delivery.run(source, self._groups(order, epoch, start), epoch)

    def example(self, count: int = 1) -> dict[str, torch.Tensor]:
        """Return one real sample of every field so many times, (count, *shape) on the device.

        Another one on each rank, so that not all of them open the same file. Where it has no
        number it is 0: the row stands in where a rank has none, with a weight of 0, and what is
        not a number stays so.
        """
        row = self._example_row
        if self._delivery.is_ragged:
            found = self._delivery.some_ragged(np.array([row], np.int64)).repeated(count)
            return {name: _finite(each) for name, each in found.items()}
        sample = {name: _finite(each) for name, each in self._delivery.one(row).items()}
        return sample if count == 1 else repeated(sample, count)

    @property
    def _example_row(self) -> int:
        return self._rank * self._dataset.samples // self._world_size

    def examples(self, most: int) -> Samples:
        """Return some real samples, as batches hold them: at most `most`, as many on every rank.

        Spread over the dataset, since neighbours are often alike.
        """
        samples = self._dataset.samples
        count = min(most, samples)
        rows = (np.arange(count, dtype=np.int64) * samples + self._rank) // count % samples
        return self._delivery.some(np.unique(rows))

    def runs(self, rows: Int64s) -> list[tuple[str, int, int]]:
        """Return runs of rows of the dataset as (name of the shard, first row in it, last).

        Args:
            rows: (count,) int64, ascending.
        """
        found: list[tuple[str, int, int]] = []
        for shard, inside in self._dataset.places(rows):
            if found and found[-1][0] == shard.name and found[-1][2] == inside - 1:
                found[-1] = (shard.name, found[-1][1], inside)
            else:
                found.append((shard.name, inside, inside))
        return found

    def read(self, rows: Int64s) -> dict[str, npt.NDArray[Any]]:
        """Return rows of the dataset by field, decoded, read with files of their own.

        Raises:
            DatasetError: if one cannot be read.
        """
        stored = read_rows(self._dataset, rows, retries=self._read_retries)
        return decoded_rows(stored, rows, self._decoding.all)

    def close(self) -> None:
        """End the thread and close all files. The loader can be used again."""
        self._delivery.close()

    def _groups(self, order: Order, epoch: int, start: int) -> Iterator[Group]:
        rows_at = self._rows_at(order, epoch, start) if self._needs_rows else None
        for bounds in group_bounds(
            start, self.epoch_size, self._global_batch_size, self._group_batches
        ):
            positions = order.positions_of_group(bounds, self._rank, self._world_size)
            if rows_at is None:
                yield Group(bounds, positions)
            else:
                rows = rows_at(positions)
                keys = order.sample_keys(epoch, positions, rows) if self._needs_keys else None
                cuts = None if self.largest_pass is None else self._cuts(order, epoch, bounds)
                yield Group(bounds, positions, rows, keys, cuts)
        # What comes next is planned while the consumer is busy with the last of this epoch.
        self._epochs.plan(epoch + 1)

    def _cuts(self, order: Order, epoch: int, bounds: list[int]) -> list[list[tuple[int, int]]]:
        """Return the passes of this rank in each batch: as many as that rank has that needs most.

        Every rank knows the lengths of all samples, and finds the same number.
        """
        dataset, most = self._dataset, self._max_tokens
        assert isinstance(dataset, View)
        assert most is not None
        plan, made = self._epochs.plan(epoch), []
        for start, stop in itertools.pairwise(bounds):
            of_ranks = []
            for rank in range(self._world_size):
                rows = plan.rows(order.positions(start, stop, rank, self._world_size))
                of_ranks.append(dataset.cut_by_values(rows, most, self._micro_batch_size))
            own, passes = of_ranks[self._rank], max(map(len, of_ranks))
            # Those without samples come first: the last is the one that the gradients come with.
            made.append([(0, 0)] * (passes - len(own)) + own)
        return made

    def _source(self, order: Order, epoch: int, start: int) -> Source:
        # The thread of an earlier epoch must not read any more.
        self._delivery.stop()
        delivery = self._delivery
        if self._memory is not None:
            rows_at = self._rows_at(order, epoch, start)
            return MemorySource(self._memory, rows_at, delivery.helpers)
        if order.block_rows == 1 or not self._windows_fit:
            return RowSource(delivery.access, self._rows_at(order, epoch, start), delivery.values)
        return BlockSource(delivery.access, self._windows(order, epoch, start), delivery.values)

    def _rows_at(self, order: Order, epoch: int, start: int) -> Callable[[Int64s], Int64s]:
        """Return what finds the rows at this rank's positions, asked in their order."""
        if order.block_rows == 1:
            return self._epochs.plan(epoch).rows
        return RowStream(self._windows(order, epoch, start)).next

    def _windows(self, order: Order, epoch: int, start: int) -> Ahead:
        plan = self._epochs.plan(epoch)
        if isinstance(plan, MixedEpoch):
            return MixedRounds(plan, self._rank, self._world_size, start, self.epoch_size)
        assert isinstance(plan, Epoch)
        return LaneWindows(plan, self._rank, self._world_size, start, self.epoch_size)


def _finite(values: torch.Tensor) -> torch.Tensor:
    """Return numbers with 0 where there is none."""
    if values.layout == torch.sparse_csr:
        values.values().nan_to_num_(0.0, 0.0, 0.0)
        return values
    return torch.nan_to_num(values, 0.0, 0.0, 0.0) if values.is_floating_point() else values
