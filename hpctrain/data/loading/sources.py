"""From the order of the samples to their values in host memory: blocks, single rows, or a cache.

Knows no torch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from hpctrain.data.arrays import Bytes, Int64s, UInt64s, within
from hpctrain.data.decoding import FieldDecoding, Numbers
from hpctrain.data.loading.prefetch import BufferPool
from hpctrain.data.loading.values import HostValues, ValueSource
from hpctrain.data.order.read_ahead import Ahead, Arrivals
from hpctrain.data.reading.scatter import Destinations, RowReader
from hpctrain.data.reading.threads import LEAST_SHARED_BYTES, Helpers, parts
from hpctrain.data.view import View
from hpctrain.errors import DatasetError


class Group(NamedTuple):
    """Consecutive global batches, read in one go, and what one rank serves of them.

    Attributes:
        bounds: position of the first sample of each batch, and one past the last of all.
        positions: (samples of this rank,) int64, ascending.
        rows: (samples of this rank,) int64, which of the dataset they are; None: nobody asks.
        keys: (samples of this rank,) uint64, what random transforms draw from; None: none do.
        cuts: of each batch the passes of this rank, as many as of any; None: nobody has cut them.
    """

    bounds: list[int]
    positions: Int64s
    rows: Int64s | None = None
    keys: UInt64s | None = None
    cuts: Sequence[Sequence[tuple[int, int]]] | None = None


class HostGroup(NamedTuple):
    """The samples of a group in host memory.

    Attributes:
        group: what they are.
        fields: by name, (samples, row_bytes) uint8.
        ragged: the fields of unequal length, by name.
    """

    group: Group
    fields: Mapping[str, Bytes]
    ragged: Mapping[str, HostValues] = {}


class Source(Protocol):
    """Reads samples of one epoch."""

    def read(self, groups: Iterable[Group], pool: BufferPool) -> Iterator[HostGroup]:
        """Yield the samples of groups that follow each other, in memory of the pool."""
        ...


def gather(origin: Bytes, rows: Int64s, out: Bytes, helpers: Helpers) -> None:
    """Copy rows of an array, several threads side by side where that is worth it.

    Args:
        origin: (any, row_bytes) uint8.
        rows: (count,) int64.
        out: (count, row_bytes) uint8.
        helpers: the threads.
    """

    def copy(part: slice) -> None:
        # "clip", as "raise" would go through a temporary array; all rows are valid.
        np.take(origin, rows[part], axis=0, out=out[part], mode="clip")

    helpers.each(copy, parts(len(rows), helpers.size if out.nbytes >= LEAST_SHARED_BYTES else 1))


def _rows_of(group: Group, rows_at: Callable[[Int64s], Int64s]) -> Int64s:
    """Return the rows of a group, which may be known."""
    return rows_at(group.positions) if group.rows is None else group.rows


class RowSource:
    """Reads every row on its own, straight to its place in the batch."""

    def __init__(
        self,
        access: RowReader,
        rows_at: Callable[[Int64s], Int64s],
        values: ValueSource | None = None,
    ) -> None:
        """Read the rows of the dataset that `rows_at` finds for the positions of each group.

        Args:
            access: reads them.
            rows_at: returns rows by position.
            values: reads the fields of unequal length; None: there are none.
        """
        self._access = access
        self._rows_at = rows_at
        self._values = values

    def read(self, groups: Iterable[Group], pool: BufferPool) -> Iterator[HostGroup]:
        for group in groups:
            fields = pool.take(len(group.positions))
            ragged = {}
            if len(group.positions):
                rows = _rows_of(group, self._rows_at)
                # Neighbours are read in one go: evaluation reads a whole batch so.
                starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
                counts = np.diff(starts, append=len(rows))
                for name, out in fields.items():
                    self._access.read_runs(name, rows[starts], counts, out, starts)
                if self._values is not None:
                    ragged = self._values.read(rows)
            yield HostGroup(group, fields, ragged)


class MemorySource:
    """Gathers samples from a dataset that is in memory whole."""

    def __init__(
        self, fields: Mapping[str, Bytes], rows_at: Callable[[Int64s], Int64s], helpers: Helpers
    ) -> None:
        """Gather rows of `fields`, (samples, row_bytes) each, that `rows_at` finds."""
        self._fields = fields
        self._rows_at = rows_at
        self._helpers = helpers

    def read(self, groups: Iterable[Group], pool: BufferPool) -> Iterator[HostGroup]:
        for group in groups:
            fields = pool.take(len(group.positions))
            rows = _rows_of(group, self._rows_at)
            for name, out in fields.items():
                gather(self._fields[name], rows, out, self._helpers)
            yield HostGroup(group, fields)


class BlockSource:
    """Reads whole blocks, each row straight to its place in this group or in one that follows.

    What a group needs is read in one go. Memory is filled ahead of it by as much as the windows of
    all lanes hold.
    """

    def __init__(
        self, access: RowReader, windows: Ahead, values: ValueSource | None = None
    ) -> None:
        """Read what the windows hold, from their first position on.

        Args:
            access: reads rows.
            windows: that are read whole.
            values: reads the fields of unequal length, of groups whose rows are known; None: there
                are none.
        """
        self._access = access
        self._windows = windows
        self._values = values

    def read(self, groups: Iterable[Group], pool: BufferPool) -> Iterator[HostGroup]:
        begun: deque[HostGroup] = deque()
        served = begun_to = 0
        left = iter(groups)

        def begin(group: Group) -> int:
            fields = pool.take(len(group.positions))
            ragged = {}
            if self._values is not None:
                assert group.rows is not None
                ragged = self._values.room(group.rows)
            begun.append(HostGroup(group, fields, ragged))
            return len(group.positions)

        for group in left:
            begun_to += begin(group)
            while begun:
                for arrivals in self._windows.until(begun[0].group.bounds[-1]):
                    while begun_to <= int(arrivals.places.max()):
                        begun_to += begin(next(left))
                    self._scatter(arrivals, begun, served)
                served += len(begun[0].group.positions)
                yield begun.popleft()

    def _scatter(self, arrivals: Arrivals, groups: Iterable[HostGroup], served: int) -> None:
        """Read rows to their places in groups, the first of which begins after so many samples."""
        filled = [each for each in groups if len(each.group.positions)]
        sizes = np.array([len(each.group.positions) for each in filled], np.int64)
        starts = served + np.cumsum(sizes) - sizes
        for name in filled[0].fields:
            into = Destinations([each.fields[name] for each in filled], starts)
            self._access.scatter_runs(name, arrivals.rows, arrivals.counts, into, arrivals.places)
        if self._values is not None:
            rows = np.repeat(arrivals.rows, arrivals.counts) + within(arrivals.counts)
            wanted = arrivals.places >= 0
            rooms = [each.ragged for each in filled]
            self._values.scatter(rows[wanted], arrivals.places[wanted], rooms, starts)


class Refusing:
    """Reads samples, and raises where one of them has a missing value of some fields."""

    def __init__(self, source: Source, decodings: Sequence[FieldDecoding]) -> None:
        """Read from `source`; check the fields of `decodings`."""
        self._source = source
        self._decodings = decodings

    def read(self, groups: Iterable[Group], pool: BufferPool) -> Iterator[HostGroup]:
        """Yield the samples of groups, as `Source.read` does.

        Raises:
            DatasetError: naming file, row and field of a missing value.
        """
        for host in self._source.read(groups, pool):
            samples = host.group.rows
            assert samples is not None
            for each in self._decodings:
                stored = each.dataset.fields[each.name]
                owners, content = samples, host.fields.get(each.name)
                if content is None and not len(samples):
                    continue
                if content is None:
                    content, offsets = host.ragged[each.name]
                    owners = np.repeat(samples, np.diff(offsets))
                numbers = content.view(stored.dtype.newbyteorder("="))
                require_all(each, numbers.reshape(len(owners), *stored.shape), owners)
            yield host
            # Its memory is for the next group that is read.
            del host


class InColumns:
    """Reads samples, and raises where a value of a sparse matrix is in a column that is not one."""

    def __init__(self, source: Source, view: View) -> None:
        """Read from `source` the samples of `view`."""
        self._source = source
        self._view = view
        self._columns = {
            name: how.columns
            for name, how in view.ragged.items()
            if how.batch == "indices" and how.columns is not None
        }

    def read(self, groups: Iterable[Group], pool: BufferPool) -> Iterator[HostGroup]:
        """Yield the samples of groups, as `Source.read` does.

        Raises:
            DatasetError: naming file, row and field of a column that is not there.
        """
        for host in self._source.read(groups, pool):
            for name, columns in self._columns.items():
                values, offsets = host.ragged.get(name, _NO_VALUES)
                dtype = self._view.fields[name].dtype.newbyteorder("=")
                indices = values.reshape(-1).view(dtype)
                # Of signed ones, those below 0 are the largest.
                wrong = indices.view(f"u{dtype.itemsize}") >= columns
                if wrong.any():
                    at = int(np.flatnonzero(wrong)[0])
                    assert host.group.rows is not None
                    row = int(np.searchsorted(offsets, at, side="right")) - 1
                    ((shard, place),) = self._view.places(host.group.rows[[row]])
                    raise DatasetError(
                        f'{shard.path}: field "{self._view.home(name)[1]}", row {place}: the '
                        f"column {indices[at]} is not one of {columns}: the file is damaged"
                    )
            yield host
            # Its memory is for the next group that is read.
            del host


_NO_VALUES = HostValues(np.empty((0, 1), np.uint8), np.zeros(1, np.int64))


def require_all(decoding: FieldDecoding, numbers: Numbers, samples: Int64s) -> None:
    """Check that none of the numbers of a field is missing.

    Args:
        decoding: of the field.
        numbers: (samples, *shape), as stored but in this machine's byte order.
        samples: which they are.

    Raises:
        DatasetError: naming file, row and field of one that is.
    """
    is_missing = decoding.missing(numbers, decoding.codes(samples))
    if not is_missing.any():
        return
    at = tuple(np.argwhere(is_missing)[0])
    name, number = decoding.name, numbers.view(decoding.viewed)[at]
    ((shard, row),) = decoding.dataset.places(samples[[at[0]]])
    raise DatasetError(
        f'{shard.path}: field "{name}", row {row}: {number} is a missing value by the attributes '
        f"of this file, and would be taken for one that is there. Mark those by a mask: "
        f'data.fields.{name}.mask = "{name}_mask"; or, of classes, set task.ignore_index = '
        f'{number}; or take all numbers as they are: data.fields.{name}.decode = "none"'
    )
