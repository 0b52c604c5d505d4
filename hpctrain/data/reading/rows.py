"""Rows of a dataset, and samples of a view: the reader that each needs.

Of a view each row is read once, however many windows hold it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

import numpy as np
import numpy.typing as npt

from hpctrain.data.arrays import Bytes, Int64s, groups_of, within
from hpctrain.data.dataset import Dataset
from hpctrain.data.reading.constants import ConstantReader
from hpctrain.data.reading.formed import FormedReader
from hpctrain.data.reading.handles import Locate, where_it_is
from hpctrain.data.reading.heaps import HeapReader
from hpctrain.data.reading.other_axis import OtherAxisReader
from hpctrain.data.reading.retry import READ_RETRIES, Retrying
from hpctrain.data.reading.scatter import (
    LEAST_DIRECT_BYTES,
    Destinations,
    RowReader,
    scatter_by_runs,
)
from hpctrain.data.reading.shards import ShardReader
from hpctrain.data.reading.threads import Helpers, ThreadMemory
from hpctrain.data.view import Column, Part, View

SCRATCH_BYTES = 32 * 2**20
"""Rows of overlapping windows that are read at once, and gathered from, about."""


class ViewReader:
    """Reads samples of a view. For one thread at a time."""

    def __init__(self, view: View, open_part: Callable[[Part], Retrying]) -> None:
        """Prepare; no file is opened yet."""
        self.dataset = view
        self._view = view
        self._parts = [open_part(part) for part in view.parts]
        self._scratch: Bytes = np.empty(0, np.uint8)
        self._staging = ThreadMemory()

    @property
    def files_opened(self) -> int:
        """How often a file was opened."""
        return sum(part.files_opened for part in self._parts)

    @property
    def failed_reads(self) -> int:
        """How often a read failed, whatever came of it."""
        return sum(part.failed_reads for part in self._parts)

    def read_runs(
        self, name: str, rows: Int64s, counts: Int64s, out: Bytes, places: Int64s
    ) -> None:
        """Read runs of consecutive samples of a field, as `ShardReader.read_runs` does rows."""
        column = self._view.columns[name]
        stride, steps = self._view.selection.stride, column.num_rows
        firsts, counts, places = self._view.selection.locate(rows, counts, places)
        firsts = firsts + column.lead
        target = out.reshape(len(out) * steps, -1)
        reader = self._parts[column.part]
        follows = column.every == 1 or steps == 1
        if follows and stride == steps:
            # Window after window, as they lie in the file.
            reader.read_runs(column.name, firsts, counts * steps, target, places * steps)
        elif follows and (stride > steps or (counts == 1).all()):
            firsts, places = _singly(firsts, counts, places, stride)
            reader.read_runs(
                column.name, firsts, np.full_like(firsts, steps), target, places * steps
            )
        else:
            self._read_overlapping(column, firsts, counts, target, places)

    def scatter_runs(
        self, name: str, rows: Int64s, counts: Int64s, into: Destinations, places: Int64s
    ) -> None:
        """Read runs of consecutive samples, each to its place, as `RowReader.scatter_runs` does."""
        column = self._view.columns[name]
        stride, steps = self._view.selection.stride, column.num_rows
        reader = self._parts[column.part]
        row_bytes = reader.dataset.fields[column.name].row_bytes
        follows = stride == steps and (column.every == 1 or steps == 1)
        if not follows or (steps > 1 and row_bytes < LEAST_DIRECT_BYTES):
            scatter_by_runs(self, self._staging, name, rows, counts, into, places)
            return
        # Window after window, as they lie in the file.
        firsts, pieces, begins = self._view.selection.locate(
            rows, counts, np.cumsum(counts) - counts
        )
        places = places[np.repeat(begins, pieces) + within(pieces)]
        reader.scatter_runs(
            column.name, firsts + column.lead, pieces * steps, *into.in_parts(steps, places)
        )

    def read_values(
        self, name: str, firsts: Int64s, counts: Int64s, out: Bytes, places: Int64s
    ) -> None:
        """Read values of samples of unequal length, as `ShardReader.read_runs` does rows.

        Args:
            name: of the field.
            firsts: (runs,) int64, the first row of each run of values.
            counts: (runs,) int64, rows, at least one.
            out: (places, bytes of a value) uint8, C-contiguous.
            places: (runs,) int64, where in `out` each run goes.
        """
        column = self._view.columns[name]
        self._parts[column.part].read_runs(column.name, firsts, counts, out, places)

    def close(self) -> None:
        """Close all files. Reading on opens them again."""
        for part in self._parts:
            part.close()

    def _room(self, rows: int, row_bytes: int) -> Bytes:
        """Return memory for rows, (rows, row_bytes) uint8; the same again, as new costs more."""
        size = rows * row_bytes
        if len(self._scratch) < size:
            self._scratch = np.empty(size, np.uint8)
        return self._scratch[:size].reshape(rows, row_bytes)

    def _read_overlapping(
        self, column: Column, firsts: Int64s, counts: Int64s, target: Bytes, places: Int64s
    ) -> None:
        """Read the rows that windows share once, and gather the windows from them."""
        stride, steps = self._view.selection.stride, column.num_rows
        row_bytes = target.shape[1]
        length = column.reach - column.lead
        most_rows = max(length, SCRATCH_BYTES // row_bytes)
        if stride >= length:
            firsts, places = _singly(firsts, counts, places, stride)
            counts = np.ones_like(firsts)
        else:
            most_samples = (most_rows - length) // stride + 1
            firsts, counts, places = _shortened(firsts, counts, places, stride, most_samples)
        rows = (counts - 1) * stride + length
        for group in groups_of(rows, most_rows):
            begins = np.cumsum(rows[group]) - rows[group]
            scratch = self._room(int(rows[group].sum()), row_bytes)
            self._parts[column.part].read_runs(
                column.name, firsts[group], rows[group], scratch, begins
            )
            windows, to = _singly(begins, counts[group], places[group], stride)
            wanted = (windows[:, None] + np.arange(steps) * column.every).ravel()
            if len(to) == to[-1] - to[0] + 1 and (np.diff(to) == 1).all():
                part = target[int(to[0]) * steps : (int(to[-1]) + 1) * steps]
                np.take(scratch, wanted, axis=0, out=part, mode="clip")
            else:
                target[(to[:, None] * steps + np.arange(steps)).ravel()] = scratch[wanted]


def _singly(firsts: Int64s, counts: Int64s, places: Int64s, stride: int) -> tuple[Int64s, Int64s]:
    """Return first row and place of every single sample of some runs."""
    inside = within(counts)
    return np.repeat(firsts, counts) + inside * stride, np.repeat(places, counts) + inside


def _shortened(
    firsts: Int64s, counts: Int64s, places: Int64s, stride: int, most: int
) -> tuple[Int64s, Int64s, Int64s]:
    """Cut runs into such of at most `most` samples."""
    pieces = -(-counts // most)
    owners = np.repeat(np.arange(len(counts)), pieces)
    done = within(pieces) * most
    return (
        firsts[owners] + done * stride,
        np.minimum(most, counts[owners] - done),
        places[owners] + done,
    )


def open_rows(
    dataset: Dataset,
    *,
    retries: int = READ_RETRIES,
    locate: Locate = where_it_is,
    helpers: Helpers | None = None,
) -> Retrying | ViewReader:
    """Return what reads the rows of a dataset; no file is opened yet.

    Args:
        dataset: a view, too.
        retries: how often a read that fails is tried again.
        locate: as ShardReader takes it.
        helpers: as ShardReader takes it.
    """

    def open_stored(dataset: Dataset, axis: int) -> RowReader:
        if axis > 0:
            return OtherAxisReader(Part(dataset, axis), locate)
        return ShardReader(dataset, locate, helpers)

    def open_part(part: Part) -> Retrying:
        dataset, axis = part.dataset, part.axis
        if part.constants is not None:
            return Retrying(ConstantReader(part), retries)
        if part.heap is not None:
            return Retrying(HeapReader(part, locate, helpers), retries)
        if all(field.form is None for field in dataset.fields.values()):
            return Retrying(open_stored(dataset, axis), retries)
        reader = FormedReader(dataset, axis, lambda stored: open_stored(stored, axis), locate)
        return Retrying(reader, retries)

    return ViewReader(dataset, open_part) if isinstance(dataset, View) else open_part(Part(dataset))


def read_rows(
    dataset: Dataset, rows: Int64s, *, retries: int = READ_RETRIES
) -> dict[str, npt.NDArray[Any]]:
    """Return rows of a dataset, (rows, *shape) a field, read with files of their own.

    Raises:
        DatasetError: if one cannot be read.
    """
    values = {}
    with closing(open_rows(dataset, retries=retries)) as access:
        for name, field in dataset.fields.items():
            out = np.empty((len(rows), field.row_bytes), np.uint8)
            places = np.arange(len(rows), dtype=np.int64)
            access.read_runs(name, rows, np.ones_like(rows), out, places)
            native = out.view(field.dtype.newbyteorder("="))
            values[name] = native.reshape(len(rows), *field.shape)
    return values
