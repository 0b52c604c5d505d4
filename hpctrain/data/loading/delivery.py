"""From host memory to batches of tensors on the device, copied there beside its work."""

from __future__ import annotations

import functools
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hpctrain.accelerator import COPIES_ASIDE, Streams, enter
from hpctrain.data.arrays import Bytes, Int64s
from hpctrain.data.dataset import Dataset
from hpctrain.data.loading.batch import Batch, Rows, Samples
from hpctrain.data.loading.decoder import torch_dtype_of
from hpctrain.data.loading.device_copies import DeviceCopies, pinned_bytes
from hpctrain.data.loading.images import ImagePreparation
from hpctrain.data.loading.prefetch import (
    ALIGNMENT_BYTES,
    DEVICE_ALIGNMENT_BYTES,
    BufferPool,
    MemoryPlan,
    Prefetch,
    new_bytes,
)
from hpctrain.data.loading.preprocessing import Preprocessing
from hpctrain.data.loading.ragged import RaggedBatch, RaggedRows, Values, documents_of
from hpctrain.data.loading.sources import (
    Group,
    HostGroup,
    InColumns,
    Refusing,
    RowSource,
    Source,
    require_all,
)
from hpctrain.data.loading.values import HostValues, ValuePool, ValueSource
from hpctrain.data.reading.handles import Locate, where_it_is
from hpctrain.data.reading.retry import READ_RETRIES
from hpctrain.data.reading.rows import ViewReader, open_rows, read_rows
from hpctrain.data.reading.threads import Helpers
from hpctrain.data.view import View
from hpctrain.utils.text import printable

logger = logging.getLogger(__name__)


def _nothing() -> None:
    """Do nothing: where tensors are there at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderOptions:
    """How a rank reads and where its batches go: the same for training and evaluation.

    Attributes:
        device: where the batches are wanted.
        buffer_mb: host memory for reading ahead, MB.
        threads: that read and decompress, side by side.
        read_retries: how often a read that fails is tried again.
        locate: which file is read for a shard, as ShardReader takes it.
    """

    device: torch.device
    buffer_mb: float
    threads: int = 1
    read_retries: int = READ_RETRIES
    locate: Locate = where_it_is


@dataclass(frozen=True, slots=True, kw_only=True)
class _Arrived:
    """A group on the device, or on its way to it.

    Attributes:
        group: what its samples are.
        fields: by name, (samples, *shape).
        ragged: the fields of unequal length, by name.
        codes: by field, which coding each row has, see `Decoder.codes`.
        keys: of the samples, if anybody wants them.
        require: to be called before the tensors are used.
    """

    group: Group
    fields: Mapping[str, torch.Tensor]
    ragged: Mapping[str, Values]
    codes: Mapping[str, torch.Tensor]
    keys: torch.Tensor | None
    require: Callable[[], None] = _nothing


class Delivery:
    """Runs a reader in a thread and makes tensors on the device of what it reads."""

    def __init__(
        self,
        dataset: Dataset,
        rows: int,
        memory: MemoryPlan,
        options: LoaderOptions,
        preprocessing: Preprocessing,
        *,
        training: bool,
    ) -> None:
        """Prepare; no file is opened yet.

        Args:
            dataset: with the fields that batches hold.
            rows: the most samples of a group.
            memory: how host memory is spent.
            options: how to read, and where the batches go.
            preprocessing: what is done to samples.
            training: False in an evaluation.
        """
        device = options.device
        self.helpers = Helpers(options.threads)
        self.access = open_rows(
            dataset,
            retries=options.read_retries,
            locate=options.locate,
            helpers=self.helpers,
        )
        self._preparation = preparation = preprocessing.preparation
        self._decoding = preprocessing.decoding
        self._batch_transform = preprocessing.batch_transform
        self._training = training
        self._fields = dataset.fields if preparation is None else preparation.fields
        self._dtypes = {name: torch_dtype_of(field.dtype) for name, field in self._fields.items()}
        self._rows = rows
        self._device = device
        self._memory = memory
        self._alignment = ALIGNMENT_BYTES if device.type == "cpu" else DEVICE_ALIGNMENT_BYTES
        groups = memory.groups_ready + (memory.groups_ahead if preparation is None else 0)
        aside = device.type in COPIES_ASIDE
        allocate = pinned_bytes if aside else new_bytes
        self._copies = DeviceCopies(Streams(device)) if aside else None
        stored = dataset.ragged if isinstance(dataset, View) else {}
        decoded = preparation.images if isinstance(preparation, ImagePreparation) else {}
        self._how = {name: how for name, how in stored.items() if name not in decoded}
        rectangular = {n: field for n, field in self._fields.items() if n not in self._how}
        self._rectangular = rectangular
        self._pool = BufferPool(rectangular, rows, groups, allocate, in_powers_of_two=aside)
        self.packed = dataset if isinstance(dataset, View) and dataset.packs else None
        self.values: ValueSource | None = None
        if stored:
            assert isinstance(dataset, View)
            assert isinstance(self.access, ViewReader)
            self.values = ValueSource(dataset, self.access, ValuePool(allocate))
        self._running: Prefetch[HostGroup] | None = None
        self._waited = 0.0
        for name, reason in dataset.slow_fields().items():
            logger.warning(
                'field "%s" is read through HDF5, which is slower: it is %s',
                printable(name),
                reason,
            )

    @property
    def needs_rows(self) -> bool:
        """Whether it has to be known which samples a group holds."""
        return self._decoding.needs_samples or self.values is not None or self.packed is not None

    @property
    def is_ragged(self) -> bool:
        """Whether batches have fields of unequal length."""
        return bool(self._how)

    @property
    def surplus_bytes(self) -> int:
        """Host memory that is taken beyond the plan: pinned memory comes in powers of two."""
        return self._pool.surplus_bytes if self._copies is not None else 0

    @property
    def wait_seconds(self) -> float:
        running = self._running
        return self._waited + (running.wait_seconds if running is not None else 0.0)

    def run(
        self, source: Source, groups: Iterator[Group], epoch: int, total: int | None = None
    ) -> Iterator[Batch | RaggedBatch]:
        """Yield the batches of the groups; of a global size of `total`, or each of its own."""
        self.stop()
        source = self._checked(source)
        produce = functools.partial(self._read_groups, source, groups)
        with Prefetch(produce, self._memory.depth) as running:
            self._running = running
            try:
                for arrived, look_ahead in self._arriving(running):
                    bounds = arrived.group.bounds
                    cuts = np.searchsorted(arrived.group.positions, bounds).tolist()
                    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
                        look_ahead()
                        own = slice(cuts[i], cuts[i + 1])
                        about: dict[str, Any] = {
                            "size": own.stop - own.start,
                            "global_size": stop - start if total is None else total,
                            "epoch": epoch,
                            "start": start,
                        }
                        if self._how:
                            passes = arrived.group.cuts
                            yield RaggedBatch(
                                rows=self._ragged(arrived, own),
                                cuts=None if passes is None else passes[i],
                                **about,
                            )
                        else:
                            yield Batch(fields=self._finish(arrived, own), **about)
            finally:
                if self._running is running:
                    self._waited += running.wait_seconds
                    self._running = None

    def _checked(self, source: Source) -> Source:
        """Return what reads the same, and refuses what is missing, or cannot be."""
        if self._decoding.refused:
            source = Refusing(source, self._decoding.refused)
        if any(how.batch == "indices" for how in self._how.values()):
            dataset = self.access.dataset
            assert isinstance(dataset, View)
            source = InColumns(source, dataset)
        return source

    def _read_groups(self, source: Source, groups: Iterator[Group]) -> Iterator[HostGroup]:
        """Read, in the reader's thread."""
        enter(self._device)  # pinned memory is the current device's
        if self._preparation is None:
            return source.read(groups, self._pool)
        return self._preparation.read_groups(
            source, groups, self._rows, self._memory.groups_ahead, self._pool
        )

    def _arriving(
        self, running: Prefetch[HostGroup]
    ) -> Iterator[tuple[_Arrived, Callable[[], None]]]:
        """Yield groups on the device, and what begins to copy the next one if it has been read.

        While the consumer works on one group, the next one is on its way; what has not been read
        yet keeps no batch waiting that is there.
        """
        if self._copies is None:
            for host in running:
                yield self._on_device(host), _nothing
            return
        ahead: deque[_Arrived] = deque()

        def look_ahead() -> None:
            if not ahead and (host := running.waiting()) is not None:
                ahead.append(self._on_device(host))

        for host in running:
            ahead.append(self._on_device(host))
            del host  # its memory is for the reader as soon as the copies are made
            while ahead:
                yield ahead.popleft(), look_ahead

    def one(self, row: int) -> dict[str, torch.Tensor]:
        """Return one row of the dataset, read by the calling thread with files of its own."""
        at = np.array([row], np.int64)
        preparation = self._preparation
        return self._delivered(self._read(at) if preparation is None else preparation.one(row), at)

    def some(self, rows: Int64s) -> Samples:
        """Return some rows of the dataset, in ascending order, read by the calling thread."""
        if self._how:
            return self.some_ragged(rows)
        return Rows(self._some(rows))

    def some_ragged(self, rows: Int64s) -> RaggedRows:
        """Return some rows of a dataset whose samples are of unequal length."""
        dataset = self.access.dataset
        assert isinstance(dataset, View)
        with closing(open_rows(dataset)) as access:
            assert isinstance(access, ViewReader)
            source = RowSource(
                access, lambda rows: rows, ValueSource(dataset, access, ValuePool(new_bytes))
            )
            checked = self._checked(source)
            group = Group([0, len(rows)], rows, rows, rows.astype(np.uint64))
            pool = BufferPool(self._rectangular, len(rows), 1, new_bytes)
            (host,) = checked.read([group], pool)
        tensors = {n: self._tensor(n, data, len(rows)) for n, data in host.fields.items()}
        return self._ragged(self._moved(group, tensors, host.ragged), slice(0, len(rows)))

    def _some(self, rows: Int64s) -> dict[str, torch.Tensor]:
        if self._preparation is not None:  # which transforms them one by one
            each = [self.one(int(row)) for row in rows]
            return {name: torch.cat([fields[name] for fields in each]) for name in each[0]}
        return self._delivered(self._read(rows), rows)

    def _delivered(
        self, values: Mapping[str, npt.NDArray[Any]], rows: Int64s
    ) -> dict[str, torch.Tensor]:
        """Return values of rows as a batch has them."""
        # Only shape and dtype of keys count: any will do.
        group = Group([0, len(rows)], rows, rows, rows.astype(np.uint64))
        tensors = {name: torch.from_numpy(each) for name, each in values.items()}
        return self._finish(self._moved(group, tensors), slice(0, len(rows)))

    def _read(self, rows: Int64s) -> dict[str, npt.NDArray[Any]]:
        """Return rows as they are stored, read by the calling thread with files of its own."""
        values = read_rows(self.access.dataset, rows)
        for each in self._decoding.refused:
            require_all(each, values[each.name], rows)
        return values

    def stop(self) -> None:
        """End the thread, if one runs."""
        if self._running is not None:
            self._running.close()
            self._waited += self._running.wait_seconds
            self._running = None

    def close(self) -> None:
        """End the thread and close all files."""
        self.stop()
        self.access.close()

    def _finish(self, arrived: _Arrived, own: slice) -> dict[str, torch.Tensor]:
        """Return some of the samples of a group, as the task wants them."""
        arrived.require()
        fields = {name: self._aligned(tensor[own]) for name, tensor in arrived.fields.items()}
        own_codes = {name: each[own] for name, each in arrived.codes.items()}
        fields = self._decoding.on_device.apply(fields, own_codes)
        if self.packed is not None and arrived.group.rows is not None:
            samples = arrived.group.rows[own]
            for name in self.packed.columns:
                fields |= documents_of(self.packed, name, samples, self._device)
        if constants := self._decoding.constants:
            fields |= constants.spread(own.stop - own.start)
        own_keys = None if arrived.keys is None else arrived.keys[own]
        return self._batch_transform.apply(fields, own_keys, training=self._training)

    def _ragged(self, arrived: _Arrived, own: slice) -> RaggedRows:
        """Return some of the samples of a group, of which the task gets a pass at a time."""
        arrived.require()
        codes = {name: each[own] for name, each in arrived.codes.items()}
        fields = {name: self._aligned(tensor[own]) for name, tensor in arrived.fields.items()}
        parts = {name: each.part(own.start, own.stop) for name, each in arrived.ragged.items()}
        for name, each in parts.items():
            kept = each.values if self._how[name].batch == "pad" else self._aligned(each.values)
            fields[name] = kept
            if name in codes:
                codes[name] = codes[name][each.owners]
        fields = self._batch_transform.scaled(self._decoding.on_device.apply(fields, codes))
        fields |= self._decoding.constants.spread(own.stop - own.start)
        return RaggedRows(
            fields={name: fields[name] for name in fields if name not in parts},
            ragged={n: each._replace(values=fields[n]) for n, each in parts.items()},
            how=self._how,
            finish=functools.partial(self._batch_transform.transformed, training=self._training),
            keys=None if arrived.keys is None else arrived.keys[own],
            size=own.stop - own.start,
        )

    def _host_values(self, name: str, host: HostValues) -> torch.Tensor:
        """Return the values of a field of unequal length, on the host."""
        shape, dtype = self._fields[name].shape, self._dtypes[name]
        return torch.from_numpy(host.values).view(dtype).view(-1, *shape)

    def _on_device(self, host: HostGroup) -> _Arrived:
        """Return a group on the device, or on its way to it."""
        size = len(host.group.positions)
        tensors = {name: self._tensor(name, data, size) for name, data in host.fields.items()}
        if self._copies is None:
            return self._moved(host.group, tensors, host.ragged)
        codes, keys = self._beside(host.group)
        with self._copies.of(host) as copying:
            return _Arrived(
                group=host.group,
                # Of no samples there is no pinned memory, and nothing to copy.
                fields={name: copying.copy(each, pinned=True) for name, each in tensors.items()},
                ragged={
                    name: Values(
                        copying.copy(self._host_values(name, each), pinned=True),
                        copying.copy(torch.from_numpy(each.offsets), pinned=False),
                        each.offsets,
                    )
                    for name, each in host.ragged.items()
                },
                codes={name: copying.copy(each, pinned=False) for name, each in codes.items()},
                keys=None if keys is None else copying.copy(keys, pinned=False),
                require=copying.require,
            )

    def _moved(
        self,
        group: Group,
        tensors: Mapping[str, torch.Tensor],
        ragged: Mapping[str, HostValues] | None = None,
    ) -> _Arrived:
        """Return a group on the device; the host waits for it."""
        codes, keys = self._beside(group)
        return _Arrived(
            group=group,
            fields={name: each.to(self._device) for name, each in tensors.items()},
            ragged={
                name: Values(
                    self._host_values(name, each).to(self._device),
                    torch.from_numpy(each.offsets).to(self._device),
                    each.offsets,
                )
                for name, each in (ragged or {}).items()
            },
            codes={name: each.to(self._device) for name, each in codes.items()},
            keys=None if keys is None else keys.to(self._device),
        )

    def _beside(self, group: Group) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Return what goes to the device beside the samples, on the host: codings and keys."""
        wanted = group.keys is not None and self._batch_transform.needs_keys
        return (
            self._decoding.on_device.codes(group.rows),
            torch.from_numpy(group.keys) if wanted else None,
        )

    def _aligned(self, batch: torch.Tensor) -> torch.Tensor:
        """Return a batch that begins where fresh tensors do.

        Matrix products sum in another order where memory begins elsewhere. In a group of batches
        that would depend on where a job has begun to read, and a run that goes on would differ from
        one that never stopped in the last bits. Most rows have a length that leaves nothing to do.
        """
        return batch if batch.data_ptr() % self._alignment == 0 else batch.clone()

    def _tensor(self, name: str, data: Bytes, size: int) -> torch.Tensor:
        """Return the tensor that shares its memory with bytes, and keeps them."""
        shape, dtype = self._fields[name].shape, self._dtypes[name]
        if size == 0:
            return torch.empty((0, *shape), dtype=dtype)
        return torch.from_numpy(data).view(dtype).view(size, *shape)
