"""Batches of tensors, on the device: what an evaluation iterates over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from hpctrain.data.arrays import Int64s
from hpctrain.data.dataset import Dataset
from hpctrain.data.loading.batch import Batch, Samples
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
from hpctrain.data.loading.sources import Group, RowSource, group_bounds
from hpctrain.data.order.order import sample_keys
from hpctrain.data.view import View


class EvaluationLoader:
    """Serves every sample of a dataset exactly once over all ranks: no padding, no repeats.

    Rank r serves the r-th of `world_size` runs of rows, in their order. Shares differ by at most
    one sample, so the numbers of batches may differ too.
    """

    def __init__(
        self,
        dataset: Dataset,
        options: LoaderOptions,
        *,
        fields: Sequence[str],
        rank: int,
        world_size: int,
        batch_size: int,
        preparation: Preparation | None = None,
        decoding: Decoding | None = None,
        batch_transform: BatchTransform | None = None,
        seed: int = 0,
        samples: int | None = None,
        rows: Int64s | None = None,
        max_tokens: int | None = None,
    ) -> None:
        """Prepare; no file is opened yet.

        Args:
            dataset: as opened, the same on all ranks.
            options: how to read, and where the batches go.
            fields: that batches hold.
            rank: of this process.
            world_size: number of ranks.
            batch_size: samples of one batch.
            preparation: what is done to every sample on the host; None: nothing.
            decoding: what is decoded; None: nothing.
            batch_transform: what is done to batches on the device; None: nothing.
            seed: of the run: what its transform draws is the same in every evaluation.
            samples: evaluate with the first so many only; None: with all.
            rows: of the dataset, which this rank is to serve in this order; None: its share.
            max_tokens: of samples of unequal length, values of a field in a batch; None: any
                number. Not of `rows`.

        Raises:
            DatasetError: if a field is not there.
        """
        self._seed = seed
        self._dataset = dataset.select(fields)
        self._world_size = world_size
        self._samples = dataset.samples if samples is None else samples
        self._wanted = rows
        if rows is None:
            self._first = rank * self._samples // world_size
            self._stop = (rank + 1) * self._samples // world_size
        else:
            self._first, self._stop = 0, len(rows)
        self._batch_size = batch_size
        self._bounds: list[int] | None = None
        self._most_batches: int | None = None
        if max_tokens is not None and rows is None and isinstance(self._dataset, View):
            self._cut(self._dataset, rank, max_tokens)
        share, staging = sample_bytes(self._dataset, preparation)
        memory = MemoryPlan.make(
            batch_size * share,
            options.buffer_mb,
            batches=len(self),
            staging=batch_size * staging,
            in_use=groups_in_use(options.device),
        )
        self._group_batches = memory.group_batches
        most = batch_size * memory.group_batches
        decoding, batch_transform = decoding or Decoding(), batch_transform or BatchTransform()
        self._needs_keys = preparation is not None or batch_transform.needs_keys
        self._delivery = Delivery(
            self._dataset,
            most,
            memory,
            options,
            preparation=preparation,
            decoding=decoding,
            batch_transform=batch_transform,
            training=False,
        )
        self.buffer_bytes = memory.total + self._delivery.surplus_bytes

    def _cut(self, dataset: View, rank: int, most: int) -> None:
        """Cut the share of every rank into batches by the lengths of its samples."""
        if not dataset.bounded:
            return
        dataset.require_at_most(most)
        world_size, samples = self._world_size, self._samples
        counts = []
        for each in range(world_size):
            first, stop = each * samples // world_size, (each + 1) * samples // world_size
            rows = np.arange(first, stop, dtype=np.int64)
            cuts = dataset.cut_by_values(rows, most, self._batch_size) if len(rows) else []
            counts.append(len(cuts))
            if each == rank:
                self._bounds = [first + start for start, _ in cuts] + [stop]
        self._most_batches = max(counts)

    def __len__(self) -> int:
        if self._bounds is not None:
            return len(self._bounds) - 1
        return len(range(self._first, self._stop, self._batch_size))

    @property
    def samples(self) -> int:
        """Samples that all ranks together serve."""
        return self._samples

    @property
    def most_batches(self) -> int:
        """How many batches the rank with the most samples has."""
        if self._most_batches is not None:
            return self._most_batches
        largest_share = -(-self._samples // self._world_size)
        return -(-largest_share // self._batch_size)

    def __iter__(self) -> Iterator[Batch | RaggedBatch]:
        self._delivery.stop()
        source = RowSource(self._delivery.access, self._rows_at, self._delivery.values)
        return self._delivery.run(source, self._groups(), 0, self._samples)

    def examples(self, most: int) -> Samples:
        """Return some real rows, as batches hold them: at most `most`, as many on every rank.

        Spread over this rank's share, since neighbours are often alike.
        """
        return self._delivery.some(self.example_rows(most))

    def example_rows(self, most: int) -> Int64s:
        """Return which rows of the dataset `examples` gives, (at most `most`,) int64, ascending."""
        samples = self._dataset.samples
        count = min(most, self._batch_size, samples)
        apart = max(1, (self._stop - self._first) // count)
        return np.sort((self._first + apart * np.arange(count, dtype=np.int64)) % samples)

    def _rows_at(self, places: Int64s) -> Int64s:
        return places if self._wanted is None else self._wanted[places]

    @property
    def wait_seconds(self) -> float:
        """How long the consumer has waited for batches so far."""
        return self._delivery.wait_seconds

    def close(self) -> None:
        """End the thread and close all files. The loader can be used again."""
        self._delivery.close()

    def _group_bounds(self) -> Iterator[list[int]]:
        size, bounds = self._group_batches, self._bounds
        if bounds is None:
            return group_bounds(self._first, self._stop, self._batch_size, size)
        return (bounds[at : at + size + 1] for at in range(0, len(bounds) - 1, size))

    def _groups(self) -> Iterator[Group]:
        for bounds in self._group_bounds():
            places = np.arange(bounds[0], bounds[-1], dtype=np.int64)
            rows = self._rows_at(places)
            keys = sample_keys(self._seed, 0, rows) if self._needs_keys else None
            yield Group(bounds, places, rows, keys)
