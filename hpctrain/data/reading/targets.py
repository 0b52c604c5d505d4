"""Where what is read goes: to memory in one piece, or every row to a place of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import numpy as np

from hpctrain.data.dataset import Field
from hpctrain.data.order.permutation import Int64s
from hpctrain.data.reading.destinations import Destinations
from hpctrain.data.reading.helpers import ThreadMemory
from hpctrain.data.reading.pieces import Bytes
from hpctrain.data.reading.vectors import read_vectors

LEAST_DIRECT_BYTES = 1024
"""Shorter rows are moved faster by a copy, out of the cache, than by the system one by one."""
STAGED_BYTES = 2**20
"""So many bytes are read before they are copied: they are in the cache then."""

Read = Callable[[int, int, int, int, int], int]
"""Reads neighbours to where they go, in one request, and returns how many bytes it got.

Takes a file's descriptor and an offset in it, the first extent, one past the last, and their bytes.
"""


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
