"""Batches of tensors, on the device: what an evaluation iterates over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hpctrain.data.arrays import Int64s
from hpctrain.data.dataset import Dataset
from hpctrain.data.loading.batch import Batch, Samples
from hpctrain.data.loading.delivery import Delivery, LoaderOptions
from hpctrain.data.loading.device_copies import groups_in_use
from hpctrain.data.loading.prefetch import MemoryPlan
from hpctrain.data.loading.preprocessing import AS_STORED, Preprocessing
from hpctrain.data.loading.ragged import RaggedBatch
from hpctrain.data.loading.sources import Group, RowSource
from hpctrain.data.order.batches import EvaluationPlan, EvaluationShare
from hpctrain.data.view import View


class EvaluationLoader:
    """Serves every sample of a dataset exactly once over all ranks: no padding, no repeats.

    Attributes:
        samples: that all ranks together serve.
        most_batches: of the rank with the most samples.
        example_rows: returns which rows of the dataset `examples` gives.
        buffer_bytes: host memory that reading ahead takes on this rank.
    """

    def __init__(
        self,
        dataset: Dataset,
        share: EvaluationShare,
        options: LoaderOptions,
        *,
        fields: Sequence[str],
        preprocessing: Preprocessing = AS_STORED,
    ) -> None:
        """Prepare; no file is opened yet.

        Args:
            dataset: as opened, the same on all ranks.
            share: what this rank serves of it.
            options: how to read, and where the batches go.
            fields: that batches hold.
            preprocessing: what is done to samples.

        Raises:
            DatasetError: if a field is not there.
        """
        self._dataset = dataset.select(fields)
        self._plan = plan = _planned(share, self._dataset)
        self.samples, self.most_batches = plan.samples, plan.most_batches
        self.example_rows = plan.example_rows
        sample, staging = preprocessing.sample_bytes(self._dataset)
        memory = MemoryPlan.make(
            share.batch_size * sample,
            options.buffer_mb,
            batches=len(plan),
            staging=share.batch_size * staging,
            in_use=groups_in_use(options.device),
        )
        self._group_batches = memory.group_batches
        self._needs_keys = preprocessing.needs_keys
        rows = share.batch_size * memory.group_batches
        self._delivery = Delivery(
            self._dataset, rows, memory, options, preprocessing, training=False
        )
        self.buffer_bytes = memory.total + self._delivery.surplus_bytes

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[Batch | RaggedBatch]:
        self._delivery.stop()
        source = RowSource(self._delivery.access, self._plan.rows, self._delivery.values)
        return self._delivery.run(source, self._groups(), 0, self.samples)

    def examples(self, most: int) -> Samples:
        """Return some real rows, as batches hold them: at most `most`, as many on every rank."""
        return self._delivery.some(self.example_rows(most))

    @property
    def wait_seconds(self) -> float:
        """How long the consumer has waited for batches so far."""
        return self._delivery.wait_seconds

    def close(self) -> None:
        """End the thread and close all files. The loader can be used again."""
        self._delivery.close()

    def _groups(self) -> Iterator[Group]:
        for bounds, places in self._plan.groups(self._group_batches):
            rows = self._plan.rows(places)
            yield Group(bounds, places, rows, self._plan.keys(rows) if self._needs_keys else None)


def _planned(share: EvaluationShare, dataset: Dataset) -> EvaluationPlan:
    """Return the batches of a dataset, whose samples may be of bounded lengths."""
    most = share.max_tokens
    is_bounded = isinstance(dataset, View) and bool(dataset.bounded)
    if most is None or share.rows is not None or not is_bounded:
        return EvaluationPlan(share, dataset.samples)
    assert isinstance(dataset, View)
    dataset.require_at_most(most)

    def cut(rows: Int64s) -> list[tuple[int, int]]:
        return dataset.cut_by_values(rows, most, share.batch_size)

    return EvaluationPlan(share, dataset.samples, cut)
