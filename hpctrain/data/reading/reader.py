"""From the order of the samples to their values in host memory. Knows no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

import numpy as np

from hpctrain.data.dataset import Dataset, Field
from hpctrain.data.loading.buffers import BufferPool
from hpctrain.data.order.lane_windows import LaneWindows, count_slots
from hpctrain.data.order.partition import Order
from hpctrain.data.order.permutation import Int64s, UInt64s
from hpctrain.data.order.shuffle import Runs
from hpctrain.data.reading.access import Bytes
from hpctrain.data.reading.helpers import LEAST_SHARED_BYTES, Helpers, parts
from hpctrain.data.reading.row_reader import RowReader


class Group(NamedTuple):
    """Consecutive global batches, read in one go, and what one rank serves of them.

    Attributes:
        bounds: position of the first sample of each batch, and one past the last of all.
        positions: (samples of this rank,) int64, ascending.
        rows: (samples of this rank,) int64, which of the dataset they are; None: nobody asks.
        keys: (samples of this rank,) uint64, what random transforms draw from; None: none do.
    """

    bounds: list[int]
    positions: Int64s
    rows: Int64s | None = None
    keys: UInt64s | None = None


class HostGroup(NamedTuple):
    """The samples of a group in host memory.

    Attributes:
        group: what they are.
        fields: by name, (samples * row_bytes,) uint8.
    """

    group: Group
    fields: Mapping[str, Bytes]


class Source(Protocol):
    """Copies samples of one epoch, in their order."""

    def gather(self, positions: Int64s, out: Mapping[str, Bytes]) -> None:
        """Copy the samples at these ascending positions to `out`, (count, row_bytes) a field."""
        ...


def read_groups(
    source: Source, groups: Iterable[Group], fields: Mapping[str, Field], pool: BufferPool
) -> Iterator[HostGroup]:
    """Yield the samples of each group."""
    for group in groups:
        size = len(group.positions)
        views = {name: pool.take(name, size * field.row_bytes) for name, field in fields.items()}
        rows = {name: views[name].reshape(size, field.row_bytes) for name, field in fields.items()}
        if size:
            source.gather(group.positions, rows)
        yield HostGroup(group, views)


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


class RowSource:
    """Reads every row on its own, straight to its place in the batch; nothing is resident."""

    def __init__(self, access: RowReader, rows_at: Callable[[Int64s], Int64s]) -> None:
        """Read the rows of the dataset that `rows_at` finds for positions."""
        self._access = access
        self._rows_at = rows_at

    def gather(self, positions: Int64s, out: Mapping[str, Bytes]) -> None:
        rows = self._rows_at(positions)
        # Neighbours are read in one go: evaluation reads a whole batch so.
        starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
        counts = np.diff(starts, append=len(rows))
        for name, target in out.items():
            self._access.read_runs(name, rows[starts], counts, target, starts)


class MemorySource:
    """Gathers samples from a dataset that is in memory whole."""

    def __init__(
        self, fields: Mapping[str, Bytes], rows_at: Callable[[Int64s], Int64s], helpers: Helpers
    ) -> None:
        """Gather rows of `fields`, (samples, row_bytes) each, that `rows_at` finds."""
        self._fields = fields
        self._rows_at = rows_at
        self._helpers = helpers

    def gather(self, positions: Int64s, out: Mapping[str, Bytes]) -> None:
        rows = self._rows_at(positions)
        for name, target in out.items():
            gather(self._fields[name], rows, target, self._helpers)


class WindowBuffers:
    """The memory of the windows of a rank's lanes, kept over epochs.

    Attributes:
        window_rows: rows that each slot has room for.
        fields: by name, (slots * window_rows, row_bytes) uint8.
    """

    def __init__(self, dataset: Dataset, order: Order, lanes: int) -> None:
        self.window_rows = order.longest_window_rows
        self.fields: dict[str, Bytes] = {
            name: np.empty((count_slots(lanes) * self.window_rows, field.row_bytes), np.uint8)
            for name, field in dataset.fields.items()
        }

    @staticmethod
    def required_bytes(dataset: Dataset, order: Order, lanes: int) -> int:
        """Return the bytes that windows of so many lanes take; 0 where a block is one row."""
        if order.block_rows == 1:
            return 0
        index_bytes = 8
        rows = count_slots(lanes) * order.longest_window_rows
        return rows * (dataset.bytes_per_sample + index_bytes)


class WindowSource:
    """Reads whole blocks into the windows of lanes, and gathers batches from them.

    What the lanes need next is read for the first batches that need it, all of it in one go.
    """

    def __init__(
        self, access: RowReader, windows: LaneWindows, buffers: WindowBuffers, helpers: Helpers
    ) -> None:
        self._access = access
        self._helpers = helpers
        self._windows = windows
        self._buffers = buffers

    def gather(self, positions: Int64s, out: Mapping[str, Bytes]) -> None:
        done = 0
        while done < len(positions):
            runs, count = self._windows.advance(positions[done:])
            if runs is not None:
                self._read(runs)
            slots, places = self._windows.find(positions[done : done + count])
            places += slots * self._buffers.window_rows
            for name, target in out.items():
                into = target[done : done + count]
                gather(self._buffers.fields[name], places, into, self._helpers)
            done += count

    def _read(self, runs: Runs) -> None:
        in_file_order = np.argsort(runs.rows)
        rows, counts = runs.rows[in_file_order], runs.counts[in_file_order]
        places = (runs.owners * self._buffers.window_rows + runs.places)[in_file_order]
        for name, buffer in self._buffers.fields.items():
            self._access.read_runs(name, rows, counts, buffer, places)
