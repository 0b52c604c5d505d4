"""Groups of samples through `data.sample_transform`, between the reader and the device."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any

import numpy as np
import numpy.typing as npt

from hpctrain.data.arrays import Bytes, Int64s
from hpctrain.data.dataset import Dataset, Field
from hpctrain.data.decoding import FieldDecoding, decoded_rows
from hpctrain.data.loading.prefetch import BufferPool, new_bytes
from hpctrain.data.loading.sources import Group, HostGroup, Source
from hpctrain.data.loading.worker import Arrays, SampleError, SampleRunner, Slot, SlotLayout
from hpctrain.data.loading.worker_pool import Job, WorkerError, WorkerPool
from hpctrain.data.reading.rows import read_rows
from hpctrain.errors import TrainingError

SLOTS = 2
"""Groups under way: one is read, or handed on, while the other is transformed."""
_JOBS_PER_WORKER = 4
"""A group is cut into so many, so that one slow sample does not keep all waiting."""


class SamplePreparation:
    """Transforms groups of samples.

    Which worker gets which samples shows in nothing: each sample is made of itself and its key.

    Attributes:
        fields: by name, what goes to the device.
    """

    def __init__(
        self,
        name: str,
        workers: WorkerPool,
        dataset: Dataset,
        *,
        needed: Sequence[str],
        row: int,
        training: bool,
        decodings: Mapping[str, FieldDecoding] | None = None,
    ) -> None:
        """Transform one sample here, to know what becomes of them.

        Args:
            name: of the transform, for messages.
            workers: that transform samples.
            dataset: with the fields that are read.
            needed: fields that have to come out.
            row: of the dataset, to try it with.
            training: False in an evaluation.
            decodings: of fields that are decoded before they are transformed.

        Raises:
            DatasetError: if the row cannot be read.
            TrainingError: if the transform fails on it, or makes nothing of it that can be used.
        """
        self._name = name
        self._runner = SampleRunner(workers.transform)
        self._workers = workers
        self._dataset = dataset
        self._training = training
        self._decodings = decodings or {}
        self._slots: list[Slot] = []
        self._inputs: BufferPool  # with the slots
        try:
            self.fields: Mapping[str, Field] = self._runner.describe(
                self._read(np.array([row])), row, needed, training=training
            )
        except SampleError as error:
            raise self._failed(error, row) from error

    @property
    def row_bytes(self) -> int:
        """Bytes of one sample as it goes to the device."""
        return sum(field.row_bytes for field in self.fields.values())

    @property
    def staging_bytes(self) -> int:
        """Bytes that the preparation takes for each sample of a group."""
        handed_over = sum(field.row_bytes for field in self._inputs_of_transform.values())
        return self._dataset.bytes_per_sample + SLOTS * (handed_over + self.row_bytes)

    @property
    def _inputs_of_transform(self) -> dict[str, Field]:
        """By name, what a sample is when the transform gets it."""
        decoded = {name: each.field for name, each in self._decodings.items()}
        return {**self._dataset.fields, **decoded}

    def _read(self, rows: Int64s) -> dict[str, npt.NDArray[Any]]:
        """Return rows as the transform gets them, read by the calling thread."""
        return decoded_rows(read_rows(self._dataset, rows), rows, self._decodings)

    def one(self, row: int) -> Arrays:
        """Return one sample, (1, *shape) a field, transformed by the calling thread."""
        inputs = self._read(np.array([row]))
        outputs = {n: np.empty((1, *f.shape), f.dtype) for n, f in self.fields.items()}
        try:
            # Only shape and dtype of it count: any key will do.
            self._runner.fill(inputs, np.array([row], np.uint64), outputs, training=self._training)
        except SampleError as error:
            raise self._failed(error, row) from error
        return outputs

    def read_groups(
        self, source: Source, groups: Iterable[Group], rows: int, ahead: int, pool: BufferPool
    ) -> Iterator[HostGroup]:
        """Yield the samples of each group, transformed.

        Args:
            source: of the samples.
            groups: of up to `rows` of them.
            rows: the most samples of a group.
            ahead: groups that the source fills in part before their turn.
            pool: of memory for what comes out.

        Raises:
            TrainingError: naming sample, shard and row, if the transform fails.
        """
        if not self._slots or self._slots[0].layout.rows < rows:
            layout = SlotLayout(rows, self._inputs_of_transform, self.fields)
            self._slots = [Slot(layout) for _ in range(SLOTS)]
            self._inputs = BufferPool(self._dataset.fields, rows, ahead + 1, new_bytes)
        free = deque(self._slots)
        running: deque[tuple[Group, Slot, list[Future[None]]]] = deque()
        try:
            for group, fields, _ in source.read(groups, self._inputs):
                if not free:
                    yield self._finish(*running[0], pool)
                    free.append(running.popleft()[1])
                slot = free.popleft()
                for name, values in fields.items():
                    if (decoding := self._decodings.get(name)) is None:
                        slot.raw_inputs[name][: len(values)] = values
                    else:
                        slot.inputs[name][: len(values)] = self._decoded(decoding, group, values)
                # Its memory is for the next group that is read, before this loop is back.
                del fields, values
                running.append((group, slot, self._submit(group, slot)))
            while running:
                yield self._finish(*running[0], pool)
                running.popleft()
        finally:
            # The slots are used again, by the next epoch at the soonest.
            futures = [future for _, _, jobs in running for future in jobs]
            for future in futures:
                future.cancel()
            wait(futures)

    def _decoded(self, decoding: FieldDecoding, group: Group, stored: Bytes) -> npt.NDArray[Any]:
        """Return the values of a group's rows of a field."""
        about = self._dataset.fields[decoding.name]
        numbers = stored.view(about.dtype.newbyteorder("=")).reshape(len(stored), *about.shape)
        assert group.rows is not None
        return decoding.decode(numbers, decoding.codes(group.rows))

    def _submit(self, group: Group, slot: Slot) -> list[Future[None]]:
        assert group.keys is not None
        size = len(group.positions)
        jobs = min(size, self._workers.size * _JOBS_PER_WORKER)
        cuts = [size * i // jobs for i in range(jobs + 1)] if jobs else [0]
        return [
            self._workers.submit(Job(slot, start, stop, group.keys[start:stop], self._training))
            for start, stop in itertools.pairwise(cuts)
        ]

    def _finish(
        self, group: Group, slot: Slot, jobs: Sequence[Future[None]], pool: BufferPool
    ) -> HostGroup:
        """Wait for the samples of a group, and copy them to memory that the device reads."""
        size = len(group.positions)
        for i, job in enumerate(jobs):
            try:
                job.result()
            except SampleError as error:
                assert group.rows is not None
                index = size * i // len(jobs) + error.index
                raise self._failed(error, int(group.rows[index])) from error
            except WorkerError as error:
                assert group.rows is not None
                start, stop = size * i // len(jobs), size * (i + 1) // len(jobs)
                raise TrainingError(
                    f"{error}. It had {stop - start} samples of {self._dataset.source}; the first "
                    f"is {self._place(int(group.rows[start]))}"
                ) from error
        fields = pool.take(size)
        for name, rows in fields.items():
            np.copyto(rows, slot.raw_outputs[name][:size])
        return HostGroup(group, fields)

    def _failed(self, error: SampleError, row: int) -> TrainingError:
        return TrainingError(
            f"{self._name} failed on sample {row} of {self._dataset.source}: {self._place(row)}\n"
            f"{error.text}"
        )

    def _place(self, row: int) -> str:
        """Return where a sample is stored."""
        ((shard, inside),) = self._dataset.places(np.array([row]))
        return f"{shard.path}, row {inside}"
