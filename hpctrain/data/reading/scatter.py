"""Where rows go that are read: runs of them to memory in one piece, or each to its own place.

A reader of files (`RowReader`) reads to an `Output`. In runs, that is an array. Scattered, every
row goes to its place in one of the batches ahead (`Destinations`): long rows straight from the
file, in system calls that read to many places; short ones in copies of many, out of the cache.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hpctrain.data.arrays import Bytes, Int64s, Pieces, as_slice, groups_of, within
from hpctrain.data.dataset import Dataset, Field
from hpctrain.data.reading.threads import ThreadMemory

MOST_VECTORS = 1024
"""Pieces of memory that one system call reads to. Source: IOV_MAX of Linux."""
LEAST_DIRECT_BYTES = 1024
"""Shorter rows are moved faster by a copy, out of the cache, than by the system one by one."""
STAGED_BYTES = 2**20
"""Bytes that are read before they are copied: they are in the cache then."""
LEAST_LONG_BYTES = 4096
"""From this length on, numpy moves rows as fast as single items."""

Box = tuple[slice, ...]
Vectors = npt.NDArray[np.uint64]
"""(pieces, 2): address and bytes of each piece of memory, as `struct iovec` is on 64 bits."""
Read = Callable[[int, int, int, int, int], int]
"""Reads neighbours to where they go, in one request, and returns how many bytes it got.

Takes a file's descriptor and an offset in it, the first extent, one past the last, and their bytes.
"""

_system = ctypes.CDLL(None)
_preadv = getattr(_system, "preadv", None) if ctypes.sizeof(ctypes.c_void_p) == 8 else None
if _preadv is not None:
    _preadv.restype = ctypes.c_ssize_t
    _preadv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64]


class RowReader(Protocol):
    """Reads rows of a dataset. For one thread at a time."""

    @property
    def dataset(self) -> Dataset:
        """What is read."""
        ...

    @property
    def files_opened(self) -> int:
        """How often a file was opened; at best once for each."""
        ...

    def read_runs(
        self, name: str, rows: Int64s, counts: Int64s, out: npt.NDArray[np.uint8], places: Int64s
    ) -> None:
        """Read runs of consecutive rows of a field, in native byte order.

        Args:
            name: of the field.
            rows: (runs,) int64, the first row of each run, counted over all shards.
            counts: (runs,) int64, rows.
            out: (places, row_bytes) uint8, C-contiguous.
            places: (runs,) int64, where in `out` each run goes.

        Raises:
            DatasetError: naming file, field and row that cannot be read.
        """
        ...

    def scatter_runs(
        self, name: str, rows: Int64s, counts: Int64s, into: Destinations, places: Int64s
    ) -> None:
        """Read runs of consecutive rows of a field, each row to a place of its own.

        Args:
            name: of the field.
            rows: (runs,) int64, the first row of each run, counted over all shards.
            counts: (runs,) int64, rows.
            into: where the rows go, in native byte order.
            places: (rows of all runs,) int64, run after run; -1: the row is not wanted.

        Raises:
            DatasetError: naming file, field and row that cannot be read.
        """
        ...

    def close(self) -> None:
        """Close all files. Reading on opens them again."""
        ...


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
        """Return the memory of each of these rows; -1 is memory that nobody reads."""
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


class Target(Protocol):
    """Where a list of extents goes. Several threads may open it, each for extents of its own.

    Attributes:
        vectors: (extents,) int64, pieces of memory that each goes to.
    """

    vectors: Int64s

    def open(self) -> AbstractContextManager[Read]:
        """Return what reads extents; all of them are in their places when the context ends."""
        ...


class InPieces:
    """Each extent to one piece of memory."""

    def __init__(self, out: Bytes, begins: Int64s, sizes: Int64s) -> None:
        """Take the extents at these bytes of C-contiguous memory."""
        self.vectors = np.ones_like(begins)
        self._out = out
        self._begins = begins
        self._sizes = sizes

    def cut(self, owners: Int64s, done: Int64s, sizes: Int64s) -> InPieces:
        """Return where parts of the extents go: of which, after how many bytes of it, how many."""
        return InPieces(self._out, self._begins[owners] + done, sizes)

    def open(self) -> AbstractContextManager[Read]:
        target = memoryview(self._out.data).cast("B")
        begins: list[int] = self._begins.tolist()
        ends: list[int] = (self._begins + self._sizes).tolist()

        def read(descriptor: int, offset: int, first: int, stop: int, size: int) -> int:
            into = [target[begins[i] : ends[i]] for i in range(first, stop)]
            return os.preadv(descriptor, into, offset)

        return nullcontext(read)


class RowByRow:
    """Each row of the extents to its place, without a copy."""

    def __init__(self, into: Destinations, rows: Int64s, counts: Int64s) -> None:
        """Take extents of so many rows each, which follow each other there."""
        self.vectors = counts
        self._into = into
        self._vectors = into.vectors(rows)
        self._address, self._step = self._vectors.ctypes.data, self._vectors.strides[0]
        self._bounds: list[int] = [0, *np.cumsum(counts).tolist()]

    def open(self) -> AbstractContextManager[Read]:
        return nullcontext(self._read)

    def _read(self, descriptor: int, offset: int, first: int, stop: int, size: int) -> int:
        begin, end = self._bounds[first], self._bounds[stop]
        return read_vectors(descriptor, self._address + begin * self._step, end - begin, offset)


def can_read_vectors() -> bool:
    """Return whether the system has the call that `read_vectors` makes."""
    return _preadv is not None


def read_vectors(descriptor: int, address: int, count: int, offset: int) -> int:
    """Read bytes of a file to pieces of memory, one after the other.

    What `os.preadv` does; that takes an object of Python for every piece: for rows of a few KB
    making them takes as long as reading. The memory has to stay until this returns.

    Args:
        descriptor: of an open file.
        address: of the first of consecutive Vectors.
        count: of them, at most MOST_VECTORS.
        offset: bytes from the start of the file.

    Returns:
        How many bytes were read; -1: it failed.
    """
    assert _preadv is not None
    return int(_preadv(descriptor, address, count, offset))


class Staged:
    """Each row of the extents to its place, in copies of many."""

    def __init__(
        self,
        into: Destinations,
        field: Field,
        rows: Int64s,
        counts: Int64s,
        staging: ThreadMemory,
    ) -> None:
        """Take extents of so many rows of a field each, which follow each other there."""
        self.vectors = np.ones_like(counts)
        self._into = into
        self._field = field
        self._rows = rows
        self._bounds: list[int] = [0, *np.cumsum(counts).tolist()]
        self._staging = staging

    @contextmanager
    def open(self) -> Iterator[Read]:
        held: list[Int64s] = []
        used = 0

        def read(descriptor: int, offset: int, first: int, stop: int, size: int) -> int:
            nonlocal used
            if used and used + size > STAGED_BYTES:
                copy()
            held.append(self._rows[self._bounds[first] : self._bounds[stop]])
            used += size
            into = self._staging.take(max(used, STAGED_BYTES))[used - size : used]
            return os.preadv(descriptor, [into.data], offset)

        def copy() -> None:
            nonlocal used
            field, rows = self._field, np.concatenate(held)
            values = self._staging.take(used).view(field.dtype).reshape(len(rows), *field.shape)
            self._into.put(field, rows, values, ())
            held.clear()
            used = 0

        yield read
        if used:
            copy()


class Output(Protocol):
    """Takes rows of one field. Several threads may hand over rows of their own."""

    def target(self, field: Field, pieces: Pieces) -> Target:
        """Return where the bytes of pieces go, as they are in the file."""
        ...

    def make_native(self, field: Field, pieces: Pieces) -> None:
        """Make values of this machine of pieces whose bytes are there."""
        ...

    def put(self, field: Field, places: Int64s, values: npt.NDArray[Any], box: Box) -> None:
        """Copy values of rows to their places.

        Args:
            field: that they are of.
            places: (rows,) int64, at least one.
            values: (rows, *shape of the box), in any byte order.
            box: the part of each row that they are.
        """
        ...

    def rows(self, field: Field, place: int, count: int) -> AbstractContextManager[Bytes]:
        """Return memory for consecutive rows, (count, row_bytes): native when the context ends."""
        ...


class InRuns:
    """Places are rows of an array: a run stays together."""

    def __init__(self, out: Bytes) -> None:
        """Take (places, row_bytes) uint8, C-contiguous."""
        self._out = out

    def target(self, field: Field, pieces: Pieces) -> Target:
        return InPieces(self._out, pieces.places * field.row_bytes, pieces.counts * field.row_bytes)

    def make_native(self, field: Field, pieces: Pieces) -> None:
        if not field.dtype.isnative:
            for place, count in zip(pieces.places.tolist(), pieces.counts.tolist(), strict=True):
                self._out[place : place + count].view(field.dtype).byteswap(inplace=True)

    def put(self, field: Field, places: Int64s, values: npt.NDArray[Any], box: Box) -> None:
        native = field.dtype.newbyteorder("=")
        rows = self._out.view(native).reshape(len(self._out), *field.shape)
        part = (as_slice(places), *box)
        rows[part] = values

    def rows(self, field: Field, place: int, count: int) -> AbstractContextManager[Bytes]:
        return nullcontext(self._out[place : place + count])


class Scattered:
    """Places are indices of a list of destinations: every row goes its own way."""

    def __init__(self, into: Destinations, places: Int64s, staging: ThreadMemory) -> None:
        """Send row i to place `places[i]` of the destinations."""
        self._into = into
        self._rows = into.locate(places)
        self._staging = staging

    def target(self, field: Field, pieces: Pieces) -> Target:
        counts = pieces.counts
        rows = self._rows[np.repeat(pieces.places, counts) + within(counts)]
        # Merged with neighbours, as ExtentReader does, they still fit one call.
        fitting = can_read_vectors() and int(counts.max()) <= MOST_VECTORS // 2
        if fitting and field.row_bytes >= LEAST_DIRECT_BYTES and field.dtype.isnative:
            return RowByRow(self._into, rows, counts)
        return Staged(self._into, field, rows, counts, self._staging)

    def make_native(self, field: Field, pieces: Pieces) -> None:
        """Do nothing: what is staged is made native as it is copied."""

    def put(self, field: Field, places: Int64s, values: npt.NDArray[Any], box: Box) -> None:
        self._into.put(field, self._rows[places], values, box)

    @contextmanager
    def rows(self, field: Field, place: int, count: int) -> Iterator[Bytes]:
        rows = self._staging.take(count * field.row_bytes).reshape(count, field.row_bytes)
        yield rows
        self._into.put_rows(self._rows[place : place + count], rows)


def scatter_by_runs(
    reader: RowReader,
    staging: ThreadMemory,
    name: str,
    rows: Int64s,
    counts: Int64s,
    into: Destinations,
    places: Int64s,
) -> None:
    """Read runs of consecutive rows, each to its place, as `RowReader.scatter_runs` does.

    They are read by `reader` to the memory of `staging`, and copied from there.
    """
    row_bytes = reader.dataset.fields[name].row_bytes
    to = into.locate(places)
    done = 0
    for group in groups_of(counts * row_bytes, STAGED_BYTES):
        some = counts[group]
        size = int(some.sum())
        out = staging.take(size * row_bytes).reshape(size, row_bytes)
        reader.read_runs(name, rows[group], some, out, np.cumsum(some) - some)
        into.put_rows(to[done : done + size], out)
        done += size
