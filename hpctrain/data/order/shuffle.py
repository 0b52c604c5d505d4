"""The order of one epoch: permuted blocks, dealt to lanes, permuted again inside windows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hpctrain.data.order.partition import Order
from hpctrain.data.order.permutation import (
    Int64s,
    UInt64s,
    derive_key,
    derive_keys,
    permutation,
    permutations,
)

# What a key is for: the permutations of blocks and of windows, and draws of samples share nothing.
_BLOCKS, _WINDOWS, _SAMPLES = 0, 1, 2


class Runs(NamedTuple):
    """Consecutive rows of the dataset, each run in one place of a window.

    Attributes:
        rows: (runs,) int64, the first row of each in the dataset.
        counts: (runs,) int64, rows.
        places: (runs,) int64, where in the window the first row goes.
        owners: (runs,) int64, which of the windows asked for.
    """

    rows: Int64s
    counts: Int64s
    places: Int64s
    owners: Int64s


class Windows(NamedTuple):
    """For each of some lanes, blocks that are shuffled together.

    Attributes:
        starts: (lanes,) int64, the first row of the lane that is served from its window.
        stops: (lanes,) int64, one past the last.
        order: (lanes, longest) int64; row `start + i` of the lane is at place order[lane, i].
    """

    starts: Int64s
    stops: Int64s
    order: Int64s


def sample_keys(seed: int, epoch: int, rows: Int64s) -> UInt64s:
    """Return the keys that random transforms of samples draw from.

    Args:
        seed: of the run.
        epoch: from 0.
        rows: (count,) int64, which rows of the dataset the samples are.

    Returns:
        (count,) uint64.
    """
    return derive_keys(derive_key(seed, epoch, _SAMPLES), rows)


class Epoch:
    """Where the samples of one epoch's stream are in the dataset.

    Holds one number per block, never one per sample.

    The last block of the dataset may be short. It lands anywhere in the permutation, so blocks
    after it start that much earlier; all arithmetic here is around that one shift.
    """

    def __init__(self, order: Order, epoch: int) -> None:
        self.order = order
        self._window_key = derive_key(order.seed, epoch, _WINDOWS)
        self._num_blocks = order.num_blocks
        self._blocks = permutation(derive_key(order.seed, epoch, _BLOCKS), self._num_blocks)
        self._missing = self._num_blocks * order.block_rows - order.samples
        self._short_at = int(np.argmax(self._blocks == self._num_blocks - 1))

    def windows(self, lanes: Int64s, lane_rows: Int64s) -> tuple[Windows, Runs]:
        """Return the window that serves a row of each lane, and what it holds.

        Windows are whole blocks, but for those that an end of a lane cuts.

        Args:
            lanes: (count,) int64.
            lane_rows: (count,) int64, each 0 to the lane's samples - 1.
        """
        order = self.order
        begins = order.lane_starts(lanes)
        ends = begins + order.lane_samples(lanes)
        # The first windows of neighbouring lanes differ in length, so that the lanes do not all
        # ask for new blocks at the same step.
        first_blocks = self._block_at(begins)
        first_stops = first_blocks + 1 + lanes % order.window
        blocks = self._block_at(begins + lane_rows)
        index = np.maximum(0, (blocks - first_stops) // order.window + 1)
        block_stops = first_stops + index * order.window
        block_starts = np.where(index == 0, first_blocks, block_stops - order.window)
        starts = np.maximum(begins, self._block_start(block_starts))
        stops = np.minimum(ends, self._block_start(np.minimum(block_stops, self._num_blocks)))
        keys = derive_keys(self._window_key, lanes, index)
        windows = Windows(starts - begins, stops - begins, permutations(keys, stops - starts))
        return windows, self._runs(block_starts, starts, stops)

    def rows(self, positions: Int64s) -> Int64s:
        """Return which rows of the dataset are at these positions of the stream.

        Args:
            positions: (count,) int64, each 0 to samples - 1.

        Returns:
            (count,) int64.
        """
        lane_rows, lanes = np.divmod(positions, self.order.lanes)
        if self.order.block_rows > 1 and len(positions):
            windows, _ = self.windows(lanes, lane_rows)
            places = np.take_along_axis(
                windows.order, (lane_rows - windows.starts)[:, None], axis=1
            )
            lane_rows = windows.starts + places[:, 0]
        return self.unshuffled_rows(lanes, lane_rows)

    def unshuffled_rows(self, lanes: Int64s, lane_rows: Int64s) -> Int64s:
        """Return which rows of the dataset lanes hold, before windows are shuffled.

        One row a block is shuffled already, and is served in this order.
        """
        places = self.order.lane_starts(lanes) + lane_rows
        blocks = self._block_at(places)
        return self._blocks[blocks] * self.order.block_rows + places - self._block_start(blocks)

    def _runs(self, block_starts: Int64s, starts: Int64s, stops: Int64s) -> Runs:
        """Return the parts of blocks between places of the permuted stream, in windows."""
        # (windows, blocks of a window), some of them beyond the window
        blocks = block_starts[:, None] + np.arange(self.order.window)
        begins = np.maximum(starts[:, None], self._block_start(blocks))
        counts = np.minimum(stops[:, None], self._block_start(blocks + 1)) - begins
        owners, which = np.nonzero(counts > 0)
        blocks, begins = blocks[owners, which], begins[owners, which]
        rows = self._blocks[blocks] * self.order.block_rows + begins - self._block_start(blocks)
        return Runs(rows, counts[owners, which], begins - starts[owners], owners)

    def _block_start(self, blocks: Int64s) -> Int64s:
        """Return the rows before each block in the permuted stream of blocks."""
        return blocks * self.order.block_rows - self._missing * (blocks > self._short_at)

    def _block_at(self, places: Int64s) -> Int64s:
        """Return the block that holds each row of the permuted stream of blocks."""
        late = places >= (self._short_at + 1) * self.order.block_rows - self._missing
        return (places + self._missing * late) // self.order.block_rows
