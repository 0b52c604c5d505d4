"""From the order of the samples to their values in host memory. Knows no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

import numpy as np

from hpctrain.data.dataset import Dataset, Field
from hpctrain.data.loading.buffers import BufferPool
from hpctrain.data.order.partition import Order, lanes_of_rank
from hpctrain.data.order.permutation import Int64s, UInt64s
from hpctrain.data.order.shuffle import Epoch, Runs
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


class LaneWindows:
    """The window that each lane of a rank is at, as positions advance."""

    def __init__(self, epoch: Epoch, rank: int, world_size: int) -> None:
        order = epoch.order
        lanes = lanes_of_rank(rank, world_size, order.lanes)
        self._epoch = epoch
        self._num_lanes = order.lanes
        self._first_lane, self._lane_step = lanes.start, lanes.step
        self._starts = np.zeros(len(lanes), np.int64)
        # The first position of each lane past its window; at first none has a window.
        self._ends = np.full(len(lanes), -1, np.int64)
        self._order = np.zeros((len(lanes), order.longest_window_rows), np.int64)

    def advance(self, ahead: Int64s) -> Runs | None:
        """Move every lane on that has served its window and is asked for more.

        Args:
            ahead: (count,) int64, the rank's next positions, at least one.

        Returns:
            What the new windows hold, `owners` being indices of lanes; None if there are none.
        """
        # The rank's lanes come in turn: so many positions ask each lane once.
        ahead = ahead[: len(self._ends)]
        indices = self._indices(ahead % self._num_lanes)
        due = self._ends[indices] <= ahead
        if not due.any():
            return None
        indices, ahead = indices[due], ahead[due]
        lane_rows, lanes = np.divmod(ahead, self._num_lanes)
        windows, runs = self._epoch.windows(lanes, lane_rows)
        self._starts[indices] = windows.starts
        self._ends[indices] = windows.stops * self._num_lanes + lanes
        self._order[indices, : windows.order.shape[1]] = windows.order
        return runs._replace(owners=indices[runs.owners])

    def served(self, ahead: Int64s) -> int:
        """Return how many of the positions ahead the present windows serve, after `advance`."""
        ends = self._ends[self._ends > ahead[0]]
        return int(np.searchsorted(ahead, ends.min()))

    def find(self, positions: Int64s) -> tuple[Int64s, Int64s]:
        """Return the index of the lane and the place in its window, for served positions."""
        lane_rows, lanes = np.divmod(positions, self._num_lanes)
        indices = self._indices(lanes)
        return indices, self._order[indices, lane_rows - self._starts[indices]]

    def rows_at(self, positions: Int64s) -> Int64s:
        """Return which rows of the dataset are at ascending positions, in calls that ascend."""
        rows = np.empty(len(positions), np.int64)
        done = 0
        while done < len(positions):
            self.advance(positions[done:])
            stop = done + self.served(positions[done:])
            indices, places = self.find(positions[done:stop])
            lanes = self._first_lane + indices * self._lane_step
            rows[done:stop] = self._epoch.unshuffled_rows(lanes, self._starts[indices] + places)
            done = stop
        return rows

    def _indices(self, lanes: Int64s) -> Int64s:
        return (lanes - self._first_lane) // self._lane_step


class WindowBuffers:
    """The memory of the windows of a rank's lanes, kept over epochs.

    Attributes:
        window_rows: rows that each lane has room for.
        fields: by name, (lanes * window_rows, row_bytes) uint8.
    """

    def __init__(self, dataset: Dataset, order: Order, lanes: int) -> None:
        self.window_rows = order.longest_window_rows
        self.fields: dict[str, Bytes] = {
            name: np.empty((lanes * self.window_rows, field.row_bytes), np.uint8)
            for name, field in dataset.fields.items()
        }

    @staticmethod
    def required_bytes(dataset: Dataset, order: Order, lanes: int) -> int:
        """Return the bytes that windows of so many lanes take; 0 where a block is one row."""
        if order.block_rows == 1:
            return 0
        index_bytes = 8
        return lanes * order.longest_window_rows * (dataset.bytes_per_sample + index_bytes)


class WindowSource:
    """Reads whole blocks into windows, one window a lane, and gathers batches from them.

    A lane's next window is read over the one before it, for the first batch that needs it.
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
            ahead = positions[done:]
            runs = self._windows.advance(ahead)
            if runs is not None:
                self._read(runs)
            stop = done + self._windows.served(ahead)
            lanes, places = self._windows.find(positions[done:stop])
            places = lanes * self._buffers.window_rows + places
            for name, target in out.items():
                gather(self._buffers.fields[name], places, target[done:stop], self._helpers)
            done = stop

    def _read(self, runs: Runs) -> None:
        in_file_order = np.argsort(runs.rows)
        rows, counts = runs.rows[in_file_order], runs.counts[in_file_order]
        places = (runs.owners * self._buffers.window_rows + runs.places)[in_file_order]
        for name, buffer in self._buffers.fields.items():
            self._access.read_runs(name, rows, counts, buffer, places)
