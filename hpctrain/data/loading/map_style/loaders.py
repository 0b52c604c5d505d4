"""Batches of a Dataset of the user's, on the device: what training and evaluation iterate over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hpctrain.data.arrays import Int64s
from hpctrain.data.loading.batch import count_passes, finite, map_tensors, named_tensors
from hpctrain.data.loading.map_style.dataset import MapDataset
from hpctrain.data.loading.map_style.passes import CollatedBatch, Fetched, PassReader, Share
from hpctrain.data.order.batches import Epochs, EvaluationPlan, EvaluationShare
from hpctrain.data.order.order import sample_keys


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

    def __init__(self, dataset: MapDataset, epochs: Epochs, reader: PassReader) -> None:
        """Prepare; nothing is read yet.

        Args:
            dataset: the same on all ranks.
            epochs: of this Dataset, and what this rank serves of them.
            reader: of the Dataset.
        """
        self._epochs = epochs
        self.epoch_size, self.order_of, self.rows = epochs.size, epochs.order_of, epochs.rows
        self.largest_share, self.smallest_share = epochs.largest_share, epochs.smallest_share
        self.largest_pass: int | None = None
        self._passes = count_passes(epochs.largest_share, epochs.batching.micro_batch_size)
        self._dataset = dataset
        self._reader = reader

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
        row = np.array([self._epochs.share.example_row(self._dataset.samples)], np.int64)
        found = self._reader.held(row, self._keys(row)).repeated(count)
        return map_tensors(finite, found)

    def examples(self, most: int) -> Fetched:
        """Return some real samples, at most `most`, as many on every rank, spread over all."""
        rows = self._epochs.share.example_rows(self._dataset.samples, most)
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
        return sample_keys(self._epochs.orders[0].seed, 0, rows)

    def _shares(self, epoch: int, start: int) -> Iterator[Share]:
        order, plan = self.order_of(epoch), self._epochs.plan(epoch)
        for (first, stop), positions in self._epochs.groups(epoch, start, 1):
            rows = plan.rows(positions)
            keys = order.sample_keys(epoch, positions, rows)
            yield Share(rows, keys, self._passes, stop - first, epoch, first)


class MapEvaluationLoader:
    """Serves every sample of a Dataset exactly once over all ranks, as `EvaluationLoader` does.

    Attributes:
        most_batches: of the rank with the most samples.
        example_rows: returns which samples `examples` gives.
        buffer_bytes: host memory that is known to be taken: what a batch takes is not.
    """

    buffer_bytes = 0

    def __init__(self, dataset: MapDataset, share: EvaluationShare, reader: PassReader) -> None:
        """Prepare; nothing is read yet.

        Args:
            dataset: the same on all ranks.
            share: what this rank serves of it.
            reader: of the Dataset.
        """
        self._reader = reader
        self._batch_size = share.batch_size
        self._plan = plan = EvaluationPlan(share, dataset.samples)
        self._rows = plan.rows(np.arange(plan.first, plan.stop, dtype=np.int64))
        self.most_batches, self.example_rows = plan.most_batches, plan.example_rows

    def __len__(self) -> int:
        return len(self._plan)

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
        return self._reader.held(rows, self._plan.keys(rows))

    def close(self) -> None:
        """End all workers. The loader can be used again."""
        self._reader.close()

    def _shares(self) -> Iterator[Share]:
        for _, places in self._plan.groups(1):
            rows = self._plan.rows(places)
            yield Share(rows, self._plan.keys(rows), 1, self._plan.samples, 0, int(rows[0]))
