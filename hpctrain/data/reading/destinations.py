"""Where rows go that do not stay together: each to its place in one of a few buffers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hpctrain.data.dataset import Field
from hpctrain.data.order.permutation import Int64s
from hpctrain.data.reading.pieces import Bytes
from hpctrain.data.reading.vectors import Vectors

Box = tuple[slice, ...]
LEAST_LONG_BYTES = 4096
"""From this length on, numpy moves rows as fast as single items."""


class Destinations:
    """Places for rows in buffers that follow each other, such as those of the batches ahead.

    Numpy moves many rows in one go only within one array. Buffers that are cut from one piece of
    memory, as those of a BufferPool are, are rows of one array here; each such piece is a slab.
    """

    def __init__(self, buffers: Sequence[Bytes], starts: Int64s) -> None:
        """Take the places of these buffers.

        Args:
            buffers: (rows, row_bytes) uint8 each, C-contiguous.
            starts: (buffers,) int64, ascending: the place that is the first row of each.
        """
        self._buffers = buffers
        self._starts = starts
        self._row_bytes = buffers[0].shape[1]
        self._slabs: list[Bytes] = []
        found: dict[tuple[int, int], int] = {}
        firsts = []
        for buffer in buffers:
            whole = buffer if buffer.base is None else buffer.base
            first, shift = divmod(buffer.ctypes.data - whole.ctypes.data, self._row_bytes)
            slab = found.setdefault((id(whole), shift), len(found))
            if slab == len(self._slabs):
                self._slabs.append(_rows_from(whole, shift, self._row_bytes))
            firsts.append((slab, first))
        self._addresses = np.array([slab.ctypes.data for slab in self._slabs])
        sizes = np.array([len(slab) for slab in self._slabs], np.int64)
        self._slab_starts = np.cumsum(sizes) - sizes
        # Of each buffer, its first row, counted over all slabs.
        self._firsts = np.array([self._slab_starts[slab] + first for slab, first in firsts])
        self._nowhere = np.empty(self._row_bytes, np.uint8)

    def in_parts(self, parts: int, places: Int64s) -> tuple[Destinations, Int64s]:
        """Return the same memory as rows that are so many times shorter, and their places."""
        size = self._row_bytes // parts
        buffers = [each.reshape(len(each) * parts, size) for each in self._buffers]
        split = (places[:, None] * parts + np.arange(parts)).ravel()
        split[split < 0] = -1
        return Destinations(buffers, self._starts * parts), split

    def locate(self, places: Int64s) -> Int64s:
        """Return which rows of all slabs these places are, (places,) int64; -1 stays."""
        which = np.searchsorted(self._starts, places, side="right") - 1
        rows = self._firsts[which] + places - self._starts[which]
        rows[places < 0] = -1
        return rows

    def vectors(self, rows: Int64s) -> Vectors:
        """Return the memory of each of these rows; -1 is memory that nobody looks at."""
        slabs = np.searchsorted(self._slab_starts, rows, side="right") - 1
        begins = self._addresses[slabs] + (rows - self._slab_starts[slabs]) * self._row_bytes
        vectors = np.empty((len(rows), 2), np.uint64)
        vectors[:, 0] = np.where(rows < 0, self._nowhere.ctypes.data, begins)
        vectors[:, 1] = self._row_bytes
        return vectors

    def put_rows(self, rows: Int64s, content: Bytes) -> None:
        """Copy whole rows.

        Args:
            rows: (count,) int64, as `locate` returns them; -1: not wanted.
            content: (count, row_bytes) uint8, C-contiguous.
        """
        self._put([_as_items(slab) for slab in self._slabs], rows, _as_items(content), ())

    def put(self, field: Field, rows: Int64s, values: npt.NDArray[Any], box: Box) -> None:
        """Copy values of rows, in the byte order of this machine.

        Args:
            field: that they are of.
            rows: (count,) int64, as `locate` returns them; -1: not wanted.
            values: (count, *shape of the box), in any byte order.
            box: the part of each row that they are.
        """
        native = field.dtype.newbyteorder("=")
        if values.shape[1:] == field.shape and values.flags.c_contiguous and values.dtype.isnative:
            self.put_rows(rows, values.reshape(len(values), -1).view(np.uint8))
            return
        typed = [slab.view(native).reshape(len(slab), *field.shape) for slab in self._slabs]
        self._put(typed, rows, values, box)

    def _put(
        self,
        slabs: Sequence[npt.NDArray[Any]],
        rows: Int64s,
        values: npt.NDArray[Any],
        box: Box,
    ) -> None:
        for slab, start in zip(slabs, self._slab_starts.tolist(), strict=True):
            inside = rows - start
            if int(inside.min()) < 0 or int(inside.max()) >= len(slab):
                own = np.flatnonzero((inside >= 0) & (inside < len(slab)))
                part = (inside[own], *box)
                slab[part] = values[own]
            else:
                part = (inside, *box)
                slab[part] = values


def _rows_from(whole: Bytes, begin: int, row_bytes: int) -> Bytes:
    """Return as many rows as there are in memory from a byte on."""
    flat = whole.reshape(-1)[begin:]
    return flat[: len(flat) // row_bytes * row_bytes].reshape(-1, row_bytes)


def _as_items(rows: Bytes) -> npt.NDArray[Any]:
    """Return short rows as single items, which numpy moves at the speed of memory.

    Long rows are moved as fast as they are; and few items numpy moves without letting go of
    Python's lock.
    """
    if rows.shape[1] >= LEAST_LONG_BYTES:
        return rows
    return rows.view(np.dtype((np.void, rows.shape[1]))).reshape(len(rows))
