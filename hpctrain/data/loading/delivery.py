"""From host memory to batches of tensors on the device."""

from __future__ import annotations

import functools
import itertools
import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hpctrain.data.dataset import Dataset, Field
from hpctrain.data.loading.buffers import ALIGNMENT_BYTES, BufferPool, MemoryPlan, new_bytes
from hpctrain.data.loading.decoder import Decoding
from hpctrain.data.loading.finishing import Finishing, keys_on
from hpctrain.data.loading.prefetch import Prefetch
from hpctrain.data.loading.preparation import SamplePreparation
from hpctrain.data.loading.refusing import Refusing, require_all
from hpctrain.data.order.permutation import Int64s
from hpctrain.data.reading.handles import Locate
from hpctrain.data.reading.helpers import Helpers
from hpctrain.data.reading.pieces import Bytes
from hpctrain.data.reading.reader import Group, HostGroup, Source
from hpctrain.data.reading.rows import open_rows, read_rows

MOST_COPIES = 2
"""Groups on their way to the device."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """This rank's share of a global batch.

    The tensors are the consumer's for as long as it keeps them: memory is used again only when
    nothing refers to it any more.

    Attributes:
        fields: by name, (size, *shape) on the device, in the dtype of the dataset where nothing
            else is asked for.
        size: samples of this share; may be 0, then the tensors have no rows.
        global_size: samples of the global batch.
        epoch: from 0.
        start: position in the epoch of the first sample of the global batch.
    """

    fields: dict[str, torch.Tensor]
    size: int
    global_size: int
    epoch: int
    start: int


class Delivery:
    """Runs a reader in a thread and makes tensors on the device of what it reads."""

    def __init__(
        self,
        dataset: Dataset,
        rows: int,
        device: torch.device,
        memory: MemoryPlan,
        *,
        read_retries: int,
        locate: Locate,
        preparation: SamplePreparation | None,
        decoding: Decoding,
        finishing: Finishing,
        training: bool,
        threads: int,
    ) -> None:
        self.helpers = Helpers(threads)
        self.access = open_rows(dataset, retries=read_retries, locate=locate, helpers=self.helpers)
        self._preparation = preparation
        self._decoding = decoding
        self._finishing = finishing
        self._training = training
        self._fields = dataset.fields if preparation is None else preparation.fields
        self._dtypes = {name: torch_dtype(field) for name, field in self._fields.items()}
        self._rows = rows
        self._device = device
        self._memory = memory
        self._pinned = device.type == "cuda"
        groups = memory.groups_ready + (memory.groups_ahead if preparation is None else 0)
        allocate = _pinned if self._pinned else new_bytes
        self._pool = BufferPool(self._fields, rows, groups, allocate)
        self._running: Prefetch[HostGroup] | None = None
        self._waited = 0.0
        # Copies to the device that may be under way, and the host memory that they read.
        self._copies: deque[tuple[torch.cuda.Event, HostGroup]] = deque()
        for name, reason in dataset.slow_fields().items():
            logger.warning(
                'field "%s" is read through HDF5, which is slower: it is %s', name, reason
            )

    @property
    def wait_seconds(self) -> float:
        running = self._running
        return self._waited + (running.wait_seconds if running is not None else 0.0)

    def run(
        self, source: Source, groups: Iterator[Group], epoch: int, total: int | None = None
    ) -> Iterator[Batch]:
        """Yield the batches of the groups; of a global size of `total`, or each of its own."""
        self.stop()
        if self._decoding.refused:
            source = Refusing(source, self._decoding.refused)
        if self._preparation is None:
            produce = functools.partial(source.read, groups, self._pool)
        else:
            produce = functools.partial(
                self._preparation.read_groups,
                source,
                groups,
                self._rows,
                self._memory.groups_ahead,
                self._pool,
            )
        with Prefetch(produce, self._memory.depth) as running:
            self._running = running
            try:
                for host in running:
                    tensors = self._to_device(host)
                    keys = self._keys(host.group)
                    codes = self._decoding.on_device.codes(host.group.rows)
                    bounds = host.group.bounds
                    cuts = np.searchsorted(host.group.positions, bounds).tolist()
                    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
                        own = slice(cuts[i], cuts[i + 1])
                        yield Batch(
                            fields=self._finish(tensors, codes, keys, own),
                            size=cuts[i + 1] - cuts[i],
                            global_size=stop - start if total is None else total,
                            epoch=epoch,
                            start=start,
                        )
            finally:
                if self._running is running:
                    self._waited += running.wait_seconds
                    self._running = None

    def one(self, row: int) -> dict[str, torch.Tensor]:
        """Return one row of the dataset, read by the calling thread with files of its own."""
        at = np.array([row], np.int64)
        # Only shape and dtype of it count: any key will do.
        group = Group([row, row + 1], at, at, at.astype(np.uint64))
        preparation = self._preparation
        values = self._read(at) if preparation is None else preparation.one(row)
        tensors = {name: torch.from_numpy(v).to(self._device) for name, v in values.items()}
        codes = self._decoding.on_device.codes(at)
        return self._finish(tensors, codes, self._keys(group), slice(0, 1))

    def some(self, rows: Int64s) -> dict[str, torch.Tensor]:
        """Return some rows of the dataset, in ascending order, read by the calling thread."""
        if self._preparation is not None:  # which transforms them one by one
            each = [self.one(int(row)) for row in rows]
            return {name: torch.cat([fields[name] for fields in each]) for name in each[0]}
        group = Group([0, len(rows)], rows, rows, rows.astype(np.uint64))
        tensors = {
            name: torch.from_numpy(values).to(self._device)
            for name, values in self._read(rows).items()
        }
        codes = self._decoding.on_device.codes(rows)
        return self._finish(tensors, codes, self._keys(group), slice(0, len(rows)))

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

    def _keys(self, group: Group) -> torch.Tensor | None:
        """Return the keys of a group on the device, if anybody wants them there."""
        if group.keys is None or not self._finishing.needs_keys:
            return None
        return keys_on(self._device, group.keys)

    def _finish(
        self,
        tensors: dict[str, torch.Tensor],
        codes: dict[str, torch.Tensor],
        keys: torch.Tensor | None,
        own: slice,
    ) -> dict[str, torch.Tensor]:
        """Return some of the samples of a group, as the task wants them."""
        fields = {name: _aligned(tensor[own]) for name, tensor in tensors.items()}
        own_codes = {name: each[own] for name, each in codes.items()}
        fields = self._decoding.on_device.apply(fields, own_codes)
        own_keys = None if keys is None else keys[own]
        return self._finishing.apply(fields, own_keys, training=self._training)

    def _to_device(self, host: HostGroup) -> dict[str, torch.Tensor]:
        size = len(host.group.positions)
        tensors = {name: self._tensor(name, data, size) for name, data in host.fields.items()}
        if not self._pinned:
            return {name: tensor.to(self._device) for name, tensor in tensors.items()}
        while self._copies and (len(self._copies) >= MOST_COPIES or self._copies[0][0].query()):
            # Without a bound a host that runs ahead of its device would take ever more memory.
            self._copies.popleft()[0].synchronize()
        copies = {name: t.to(self._device, non_blocking=True) for name, t in tensors.items()}
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._copies.append((event, host))
        return copies

    def _tensor(self, name: str, data: Bytes, size: int) -> torch.Tensor:
        """Return the tensor that shares its memory with bytes, and keeps them."""
        shape, dtype = self._fields[name].shape, self._dtypes[name]
        if size == 0:
            return torch.empty((0, *shape), dtype=dtype)
        return torch.from_numpy(data).view(dtype).view(size, *shape)


def torch_dtype(field: Field) -> torch.dtype:
    """Return the dtype of tensors of a field; fields have only dtypes that torch has too."""
    dtype = getattr(torch, field.dtype.name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _aligned(batch: torch.Tensor) -> torch.Tensor:
    """Return a batch that begins where fresh tensors do, at a multiple of 64 bytes.

    Matrix products sum in another order where memory begins elsewhere. In a group of batches that
    would depend on where a job has begun to read, and a run that goes on would differ from one
    that never stopped in the last bits. Most rows have a length that leaves nothing to do.
    """
    return batch if batch.data_ptr() % ALIGNMENT_BYTES == 0 else batch.clone()


def _pinned(size: int) -> Bytes:
    """Return memory that the device copies from while the host goes on."""
    array: Bytes = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
    return array
