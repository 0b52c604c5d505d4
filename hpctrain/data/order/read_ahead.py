"""Reading ahead: which windows a rank's lanes need next, and where their rows go.

Pure arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from hpctrain.data.arrays import Int64s, within
from hpctrain.data.order.epochs import Epoch, MixedEpoch, Runs, Windows
from hpctrain.data.order.order import lanes_of_rank

MOST_ROWS = 2**16
"""Rows whose places are computed in one go: some 100 bytes each."""


class Arrivals(NamedTuple):
    """Runs of consecutive rows of the dataset, and the place of each row among a rank's samples.

    Attributes:
        rows: (runs,) int64, the first row of each run.
        counts: (runs,) int64, rows.
        places: (rows of all runs,) int64, run after run; 0 is the rank's first sample. -1: the
            rank does not serve the row.
    """

    rows: Int64s
    counts: Int64s
    places: Int64s


class Ahead(Protocol):
    """What a rank reads before its turn, by the rows of the dataset."""

    def until(self, position: int) -> Iterator[Arrivals]:
        """Take what the positions below this one need, and no call before took."""
        ...


class LaneWindows:
    """Gives the windows of a rank's lanes in the order in which they are needed.

    A window is read whole where its first row is needed. So rows arrive ahead of their turn, by
    less than a window of every lane.
    """

    def __init__(self, epoch: Epoch, rank: int, world_size: int, start: int, stop: int) -> None:
        """Serve the rank's part of the positions start to stop - 1 of an epoch."""
        lanes = lanes_of_rank(rank, world_size, epoch.order.lanes)
        self._epoch = epoch
        self._num_lanes = epoch.order.lanes
        self._lanes = np.array(lanes, np.int64)
        self._start, self._stop = start, stop
        self._before = int(epoch.order.shares(0, start, world_size)[rank])
        # Of each lane, the first of its rows that no window has brought yet.
        self._next = self._lane_rows_below(start)

    def until(self, position: int) -> Iterator[Arrivals]:
        """Take the windows that the positions below this one need, and no call before took.

        Yields:
            What some of them hold, by the rows of the dataset; at most about MOST_ROWS rows.
        """
        needed = self._lane_rows_below(position)
        most = max(1, MOST_ROWS // self._epoch.order.longest_window_rows)
        while len(due := np.flatnonzero(self._next < needed)[:most]):
            windows, runs = self._epoch.windows(self._lanes[due], self._next[due])
            self._next[due] = windows.stops
            yield self._arrivals(due, windows, runs)

    def _arrivals(self, due: Int64s, windows: Windows, runs: Runs) -> Arrivals:
        in_file_order = np.argsort(runs.rows)
        rows, counts, firsts, owners = (each[in_file_order] for each in runs)
        # What row of the lane is at a place of the window: the inverse of the order.
        lane_rows = np.empty_like(windows.order)
        np.put_along_axis(lane_rows, windows.order, np.arange(windows.order.shape[1])[None], axis=1)
        lane_rows += windows.starts[:, None]
        positions = lane_rows * self._num_lanes + self._lanes[due, None]
        places = lane_rows * len(self._lanes) + (due[:, None] - self._before)
        places[(positions < self._start) | (positions >= self._stop)] = -1
        of_rows = np.repeat(owners, counts), np.repeat(firsts, counts) + within(counts)
        return Arrivals(rows, counts, places[of_rows])

    def _lane_rows_below(self, position: int) -> Int64s:
        """Return how many rows of each lane are at positions below this one."""
        return (position - self._lanes + self._num_lanes - 1) // self._num_lanes


class MixedRounds:
    """Gives what a rank serves of the rounds of a mixture, in the order in which it is needed.

    A round is read where its first position is needed: of each source, runs of neighbours.
    """

    def __init__(
        self, epoch: MixedEpoch, rank: int, world_size: int, start: int, stop: int
    ) -> None:
        """Serve the rank's part of the positions start to stop - 1 of an epoch."""
        self._epoch = epoch
        self._rank, self._world_size = rank, world_size
        self._next, self._stop = start, stop
        self._served = 0

    def until(self, position: int) -> Iterator[Arrivals]:
        """Take the rounds that the positions below this one need, and no call before took.

        Yields:
            What one of them holds for this rank, by the rows of the dataset.
        """
        order, pattern = self._epoch.order, self._epoch.pattern
        while self._next < min(position, self._stop):
            begun = (self._next - pattern.mixture.start.position) % pattern.round_samples
            stop = min(self._next - begun + pattern.round_samples, self._stop)
            positions = order.positions(self._next, stop, self._rank, self._world_size)
            self._next = stop
            if len(positions):
                yield self._arrivals(self._epoch.rows(positions))

    def _arrivals(self, rows: Int64s) -> Arrivals:
        in_file_order = np.argsort(rows, kind="stable")
        rows = rows[in_file_order]
        starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
        places = self._served + in_file_order
        self._served += len(rows)
        return Arrivals(rows[starts], np.diff(starts, append=len(rows)), places)


class RowStream:
    """Returns which rows of the dataset a rank serves, in the order of its samples."""

    def __init__(self, windows: Ahead) -> None:
        self._windows = windows
        self._served = 0
        self._ahead = np.empty(0, np.int64)

    def next(self, positions: Int64s) -> Int64s:
        """Return the rows at positions, (count,) int64.

        Args:
            positions: (count,) int64, those of the rank that follow the ones of the call before.
        """
        if not len(positions):
            return np.empty(0, np.int64)
        for arrivals in self._windows.until(int(positions[-1]) + 1):
            wanted = arrivals.places >= 0
            rows = np.repeat(arrivals.rows, arrivals.counts) + within(arrivals.counts)
            places = arrivals.places - self._served
            missing = int(places.max()) + 1 - len(self._ahead)
            if missing > 0:
                self._ahead = np.append(self._ahead, np.empty(missing, np.int64))
            self._ahead[places[wanted]] = rows[wanted]
        self._served += len(positions)
        found, self._ahead = np.split(self._ahead, [len(positions)])
        return found
