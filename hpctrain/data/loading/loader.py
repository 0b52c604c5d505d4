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
from hpctrain.data.loading.batch import Batch, Samples, finite, repeated
from hpctrain.data.loading.delivery import Delivery, LoaderOptions
from hpctrain.data.loading.device_copies import groups_in_use
from hpctrain.data.loading.prefetch import MemoryPlan
from hpctrain.data.loading.preprocessing import AS_STORED, Preprocessing
from hpctrain.data.loading.ragged import RaggedBatch
from hpctrain.data.loading.sources import BlockSource, Group, MemorySource, RowSource, Source
from hpctrain.data.order.batches import Epochs
from hpctrain.data.order.epochs import Epoch, MixedEpoch
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
        epochs: Epochs,
        options: LoaderOptions,
        *,
        fields: Sequence[str],
        preprocessing: Preprocessing = AS_STORED,
        memory: Mapping[str, Bytes] | None = None,
    ) -> None:
        """Prepare; no file is opened yet.

        Args:
            dataset: as opened, the same on all ranks.
            epochs: of this dataset, and what this rank serves of them.
            options: how to read, and where the batches go.
            fields: that batches hold.
            preprocessing: what is done to samples.
            memory: all samples by field, as `hold_on_node` returns them; None: read the files.

        Raises:
            DatasetError: if a field is not there.
        """
        self._dataset = dataset.select(fields)
        self._epochs = epochs
        self._read_retries = options.read_retries
        self.epoch_size, self.order_of, self.rows = epochs.size, epochs.order_of, epochs.rows
        self.largest_share, self.smallest_share = epochs.largest_share, epochs.smallest_share
        global_batch_size = epochs.batching.global_batch_size
        ahead = max(each.batches_ahead(global_batch_size) for each in epochs.orders)
        share, staging = preprocessing.sample_bytes(self._dataset)
        self._memory = memory
        spent = MemoryPlan.make(
            self.largest_share * share,
            options.buffer_mb,
            batches=epochs.batches,
            ahead=0 if memory is not None else ahead,
            ahead_share=self.largest_share * self._dataset.bytes_per_sample,
            staging=self.largest_share * staging,
            in_use=groups_in_use(options.device),
        )
        self._windows_fit = spent.windows_fit
        self._group_batches = spent.group_batches
        self._needs_keys = preprocessing.needs_keys
        self._decoding = preprocessing.decoding
        rows = epochs.largest_share_of_group(spent.group_batches)
        self._delivery = Delivery(self._dataset, rows, spent, options, preprocessing, training=True)
        self._needs_rows = self._needs_keys or self._delivery.needs_rows
        self.largest_pass: int | None = None
        most, micro_batch_size = epochs.batching.max_tokens, epochs.batching.micro_batch_size
        if most is not None and isinstance(self._dataset, View) and self._dataset.bounded:
            self._dataset.require_at_most(most)
            here = np.full(self.largest_share, self._example_row, np.int64)
            cuts = self._dataset.cut_by_values(here, most, micro_batch_size)
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
            return {name: finite(each) for name, each in found.items()}
        sample = {name: finite(each) for name, each in self._delivery.one(row).items()}
        return sample if count == 1 else repeated(sample, count)

    @property
    def _example_row(self) -> int:
        return self._epochs.share.example_row(self._dataset.samples)

    def examples(self, most: int) -> Samples:
        """Return some real samples, as batches hold them: at most `most`, as many on every rank."""
        return self._delivery.some(self._epochs.share.example_rows(self._dataset.samples, most))

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
        for bounds, positions in self._epochs.groups(epoch, start, self._group_batches):
            if rows_at is None:
                yield Group(bounds, positions)
            else:
                rows = rows_at(positions)
                keys = order.sample_keys(epoch, positions, rows) if self._needs_keys else None
                cuts = None if self.largest_pass is None else self._cuts(order, epoch, bounds)
                yield Group(bounds, positions, rows, keys, cuts)

    def _cuts(self, order: Order, epoch: int, bounds: list[int]) -> list[list[tuple[int, int]]]:
        """Return the passes of this rank in each batch: as many as that rank has that needs most.

        Every rank knows the lengths of all samples, and finds the same number.
        """
        dataset, batching, share = self._dataset, self._epochs.batching, self._epochs.share
        assert isinstance(dataset, View)
        assert batching.max_tokens is not None
        plan, made = self._epochs.plan(epoch), []
        for start, stop in itertools.pairwise(bounds):
            of_ranks = []
            for rank in range(share.world_size):
                rows = plan.rows(order.positions(start, stop, rank, share.world_size))
                of_ranks.append(
                    dataset.cut_by_values(rows, batching.max_tokens, batching.micro_batch_size)
                )
            own, passes = of_ranks[share.rank], max(map(len, of_ranks))
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
        plan, share = self._epochs.plan(epoch), self._epochs.share
        if isinstance(plan, MixedEpoch):
            return MixedRounds(plan, share.rank, share.world_size, start, self.epoch_size)
        assert isinstance(plan, Epoch)
        return LaneWindows(plan, share.rank, share.world_size, start, self.epoch_size)
