"""Batches of a Dataset of the user's, on the device: what training and evaluation iterate over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpctrain.data.arrays import Int64s
from hpctrain.data.loading.batch import count_passes, map_tensors, named_tensors
from hpctrain.data.loading.map_style.dataset import MapDataset
from hpctrain.data.loading.map_style.passes import CollatedBatch, Fetched, PassReader, Share
from hpctrain.data.order.epochs import Draw, Epochs
from hpctrain.data.order.order import Order, sample_keys


class MapTrainLoader:
    """Serves the epochs of a Dataset, in the order of the same samples in memory.

    Attributes:
        epoch_size: samples of all ranks that an epoch serves.
        largest_share: the most samples of any rank in any full batch.
        smallest_share: the fewest of any rank in any batch that begins where one ends.
        order_of: returns the order of an epoch, for the resume state.
        rows: returns which samples this rank serves of positions of an epoch.
        buffer_bytes: host memory that is known to be taken: what a batch takes is not.
        failed_reads: how often a read was tried again; a Dataset's own affair.
    """

    buffer_bytes = 0
    failed_reads = 0

    def __init__(
        self,
        dataset: MapDataset,
        order: Order,
        reader: PassReader,
        *,
        global_batch_size: int,
        micro_batch_size: int | None,
        drop_last: bool,
        rank: int,
        world_size: int,
        begun: Mapping[int, Order] | None = None,
        draw: Draw | None = None,
        limit: float | None = None,
        begin: int = 0,
    ) -> None:
        """Prepare; nothing is read yet.

        Args:
            dataset: the same on all ranks.
            order: of the epochs.
            reader: of the Dataset.
            global_batch_size: samples of all ranks in one batch.
            micro_batch_size: at most so many samples in one pass; None: a rank's whole share.
            drop_last: leave out the last, smaller batch of an epoch.
            rank: of this process.
            world_size: number of ranks.
            begun: epochs that began in another order than `order`, and end in it.
            draw: what draws samples by weight, where the order is one of those.
            limit: end epochs after so many batches, as `served_samples` takes it.
            begin: position at which epochs of `begun` go on.

        Raises:
            ConfigError: if there are more ranks than lanes.
            DatasetError: if the batch is larger than the Dataset.
        """
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
        self.epoch_size, self.order_of, self.rows = epochs.size, epochs.order_of, epochs.rows
        self.largest_share, self.smallest_share = epochs.largest_share, epochs.smallest_share
        self.largest_pass: int | None = None
        self._passes = count_passes(epochs.largest_share, micro_batch_size)
        self._dataset = dataset
        self._reader = reader
        self._seed = order.seed
        self._rank, self._world_size = rank, world_size

    @property
    def wait_seconds(self) -> float:
        """How long the consumer has waited for batches so far."""
        return self._reader.wait_seconds

    def epoch(self, epoch: int, start: int = 0) -> Iterator[CollatedBatch]:
        """Yield this rank's share of every global batch of an epoch.

        Args:
            epoch: from 0.
            start: position to start at, 0 to `epoch_size` - 1.

        Raises:
            DatasetError, TrainingError: while iterating, naming the sample that cannot be had.
        """
        return self._reader.run(self._shares(epoch, start))

    def example(self, count: int = 1) -> Any:
        """Return one real sample so many times, as a pass has it, on the device.

        Another one on each rank. Where it has no number it is 0, as in `TrainLoader.example`.
        """
        row = np.array([self._rank * self._dataset.samples // self._world_size], np.int64)
        found = self._reader.held(row, self._keys(row)).repeated(count)
        return map_tensors(_finite, found)

    def examples(self, most: int) -> Fetched:
        """Return some real samples, at most `most`, as many on every rank, spread over all."""
        samples = self._dataset.samples
        count = min(most, samples)
        rows = (np.arange(count, dtype=np.int64) * samples + self._rank) // count % samples
        rows = np.unique(rows)
        return self._reader.held(rows, self._keys(rows))

    def runs(self, rows: Int64s) -> list[tuple[str, int, int]]:
        """Return runs of samples as (name of the Dataset, first, last).

        Args:
            rows: (count,) int64, ascending.
        """
        found: list[tuple[str, int, int]] = []
        for row in rows.tolist():
            if found and found[-1][2] == row - 1:
                found[-1] = (*found[-1][:2], row)
            else:
                found.append((self._dataset.source, row, row))
        return found

    def read(self, rows: Int64s) -> dict[str, npt.NDArray[Any]]:
        """Return what samples hold, by name, as far as all of them hold the same.

        Raises:
            DatasetError, TrainingError: if one cannot be had.
        """
        held = self._reader.held(rows, self._keys(rows))
        each = [dict(named_tensors(held.part(at, at + 1))) for at in range(len(rows))]
        names = [name for name in each[0] if len({one[name].shape for one in each}) == 1]
        return {name: torch.cat([one[name] for one in each]).cpu().numpy() for name in names}

    def close(self) -> None:
        """End all workers. The loader can be used again."""
        self._reader.close()

    def _keys(self, rows: Int64s) -> npt.NDArray[np.uint64]:
        return sample_keys(self._seed, 0, rows)

    def _shares(self, epoch: int, start: int) -> Iterator[Share]:
        epochs, plan = self._epochs, self._epochs.plan(epoch)
        for first in range(start, epochs.size, epochs.batch):
            stop = min(first + epochs.batch, epochs.size)
            positions = epochs.positions(epoch, first, stop)
            rows = plan.rows(positions)
            keys = epochs.order_of(epoch).sample_keys(epoch, positions, rows)
            yield Share(rows, keys, self._passes, stop - first, epoch, first)
        # What comes next is planned while the consumer is busy with the last of this epoch.
        epochs.plan(epoch + 1)


class MapEvaluationLoader:
    """Serves every sample of a Dataset exactly once over all ranks, as `EvaluationLoader` does.

    Attributes:
        buffer_bytes: host memory that is known to be taken: what a batch takes is not.
    """

    buffer_bytes = 0

    def __init__(
        self,
        dataset: MapDataset,
        reader: PassReader,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        samples: int | None = None,
        rows: Int64s | None = None,
    ) -> None:
        """Prepare; nothing is read yet.

        Args:
            dataset: the same on all ranks.
            reader: of the Dataset.
            batch_size: samples of one batch.
            rank: of this process.
            world_size: number of ranks.
            seed: of the run: what samples draw is the same in every evaluation.
            samples: evaluate with the first so many only; None: with all.
            rows: of the Dataset, which this rank is to serve in this order; None: its share.
        """
        self._dataset = dataset
        self._reader = reader
        self._seed = seed
        self._world_size = world_size
        self._samples = dataset.samples if samples is None else samples
        if rows is None:
            first, stop = (each * self._samples // world_size for each in (rank, rank + 1))
            rows = np.arange(first, stop, dtype=np.int64)
        self._rows = rows
        self._batch_size = batch_size

    def __len__(self) -> int:
        return len(range(0, len(self._rows), self._batch_size))

    @property
    def most_batches(self) -> int:
        """How many batches the rank with the most samples has."""
        largest_share = -(-self._samples // self._world_size)
        return -(-largest_share // self._batch_size)

    @property
    def wait_seconds(self) -> float:
        """How long the consumer has waited for batches so far."""
        return self._reader.wait_seconds

    @property
    def first_batch(self) -> int:
        """How many batches of the Dataset are before the first of this rank."""
        return int(self._rows[0]) // self._batch_size if len(self._rows) else 0

    def rows_of(self, index: int) -> Int64s:
        """Return which samples a batch of this rank is made of."""
        return self._rows[index * self._batch_size : (index + 1) * self._batch_size]

    def __iter__(self) -> Iterator[CollatedBatch]:
        return self._reader.run(self._shares())

    def examples(self, most: int) -> Fetched:
        """Return some real samples: at most `most`, as many on every rank, of its own share."""
        rows = self.example_rows(most)
        return self._reader.held(rows, sample_keys(self._seed, 0, rows))

    def example_rows(self, most: int) -> Int64s:
        """Return which samples `examples` gives, (at most `most`,) int64, ascending."""
        samples = self._dataset.samples
        count = min(most, self._batch_size, samples)
        first = int(self._rows[0]) if len(self._rows) else 0
        apart = max(1, len(self._rows) // count)
        return np.sort((first + apart * np.arange(count, dtype=np.int64)) % samples)

    def close(self) -> None:
        """End all workers. The loader can be used again."""
        self._reader.close()

    def _shares(self) -> Iterator[Share]:
        for first in range(0, len(self._rows), self._batch_size):
            rows = self._rows[first : first + self._batch_size]
            keys = sample_keys(self._seed, 0, rows)
            yield Share(rows, keys, 1, self._samples, 0, int(rows[0]))


def _finite(tensor: Tensor) -> Tensor:
    return torch.nan_to_num(tensor, 0.0, 0.0, 0.0) if tensor.is_floating_point() else tensor
