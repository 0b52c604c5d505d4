"""Epochs of an order: which row of the dataset is where in the stream.

Pure arithmetic. An epoch holds one number per block, never one per sample.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import xxhash

from hpctrain.data.arrays import Int64s
from hpctrain.data.order.mixture import MOST_ROUND_SAMPLES, Pattern
from hpctrain.data.order.order import KEY_OF_BLOCKS, KEY_OF_WINDOWS, Order
from hpctrain.data.order.permutation import derive_key, derive_keys, permutation, permutations

MOST_EPOCHS_KEPT = 64
"""Epochs of sources whose order is kept: each has one number per block."""
MOST_ROUNDS_KEPT = 2


class Plan(Protocol):
    """Where the samples of one epoch's stream are in the dataset."""

    def rows(self, positions: Int64s) -> Int64s:
        """Return which rows of the dataset are at these positions of the stream."""
        ...


class Draw(Protocol):
    """What draws samples by weight."""

    def rows(self, seed: int, epoch: int, positions: Int64s) -> Int64s:
        """Return which rows of the dataset are at these positions of an epoch's stream."""
        ...


def plan_epoch(order: Order, epoch: int, draw: Draw | None = None) -> Plan:
    """Return where the samples of an epoch are; a weighted order needs what draws them."""
    if order.mixture is not None:
        return MixedEpoch(order, epoch)
    if order.sampling == "shuffled":
        return Epoch(order, epoch)
    if order.sampling == "sequential":
        return InOrder()
    assert draw is not None
    return Drawn(draw, order.seed, epoch)


@dataclass(frozen=True, slots=True)
class Drawn:
    """An epoch of a weighted order."""

    draw: Draw
    seed: int
    epoch: int

    def rows(self, positions: Int64s) -> Int64s:
        """Return the rows that are drawn for these positions of the stream."""
        return self.draw.rows(self.seed, self.epoch, positions)


class InOrder:
    """Any epoch of a sequential order."""

    def rows(self, positions: Int64s) -> Int64s:
        """Return the rows at these positions of the stream: the same numbers."""
        return positions


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


class Epoch:
    """Where the samples of one epoch's stream are in the dataset.

    Of a shuffled order. Holds one number per block, never one per sample.

    The last block of the dataset may be short. It lands anywhere in the permutation, so blocks
    after it start that much earlier; all arithmetic here is around that one shift.
    """

    def __init__(self, order: Order, epoch: int) -> None:
        self.order = order
        self._window_key = derive_key(order.seed, epoch, KEY_OF_WINDOWS)
        self._num_blocks = order.num_blocks
        self._blocks = permutation(derive_key(order.seed, epoch, KEY_OF_BLOCKS), self._num_blocks)
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
        return self.rows_in_blocks(self.order.lane_starts(lanes) + lane_rows)

    def rows_in_blocks(self, places: Int64s) -> Int64s:
        """Return which rows of the dataset the permuted blocks hold, one after the other."""
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


class MixedEpoch:
    """Where the samples of one epoch's stream are in the dataset that joins the sources."""

    def __init__(self, order: Order, epoch: int) -> None:
        """Draw up an epoch of an order that has a mixture."""
        assert order.mixture is not None
        self.order = order
        self.pattern = Pattern(
            order.mixture, lanes=order.lanes, length=order.length, seed=order.seed, epoch=epoch
        )
        sources = order.mixture.sources
        self._sources = sources
        sizes = np.array([each.samples for each in sources], np.int64)
        self._sizes, self._firsts = sizes, np.cumsum(sizes) - sizes
        self._keys = [
            derive_key(order.seed, xxhash.xxh3_64_intdigest(each.name.encode())) for each in sources
        ]
        self._epochs: OrderedDict[tuple[int, int], Epoch] = OrderedDict()
        self._rounds: OrderedDict[int, tuple[Int64s, Int64s]] = OrderedDict()

    def rows(self, positions: Int64s) -> Int64s:
        """Return which rows of the dataset are at these positions of the stream, (count,) int64."""
        sources, places = self.places(positions)
        rows = np.empty_like(positions)
        for source in np.unique(sources).tolist():
            mine = sources == source
            rows[mine] = self._firsts[source] + self._rows_of(source, places[mine])
        return rows

    def places(self, positions: Int64s) -> tuple[Int64s, Int64s]:
        """Return the source at each position, and the place in its own stream, (count,) int64.

        Place p of a source of N samples is in its epoch p // N.
        """
        if self.pattern.mixture.round_rows == 1:
            return self._places_by_row(positions)
        found = np.empty((2, len(positions)), np.int64)
        rounds = (positions - self.pattern.mixture.start.position) // self.pattern.round_samples
        for index in np.unique(rounds).tolist():
            mine = rounds == index
            at = positions[mine]
            first, sources, places = self._round(int(at[0]))
            found[0, mine], found[1, mine] = sources[at - first], places[at - first]
        return found[0], found[1]

    def _round(self, position: int) -> tuple[int, Int64s, Int64s]:
        first = position - (
            (position - self.pattern.mixture.start.position) % self.pattern.round_samples
        )
        if first not in self._rounds:
            _, sources, places = self.pattern.of_round(first)
            self._rounds[first] = sources, places
            if len(self._rounds) > MOST_ROUNDS_KEPT:
                self._rounds.popitem(last=False)
        return first, *self._rounds[first]

    def _places_by_row(self, positions: Int64s) -> tuple[Int64s, Int64s]:
        found = np.empty((2, len(positions)), np.int64)
        rows, lanes = np.divmod(positions, self.order.lanes)
        wanted, which = np.unique(rows, return_inverse=True)
        most = max(1, MOST_ROUND_SAMPLES // self.order.lanes)
        for first in range(0, len(wanted), most):
            mine = (which >= first) & (which < first + most)
            at = which[mine] - first, lanes[mine]
            sources, ordinals = self.pattern.of_rows(wanted[first : first + most])
            found[0, mine], found[1, mine] = sources[at], ordinals[at]
        return found[0], found[1]

    def _rows_of(self, source: int, places: Int64s) -> Int64s:
        """Return the rows of a source at places of its own stream."""
        epochs, inside = np.divmod(places, self._sizes[source])
        if self.order.sampling == "sequential":
            return inside
        rows = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            mine = epochs == epoch
            rows[mine] = self._epoch(source, epoch).rows_in_blocks(inside[mine])
        return rows

    def _epoch(self, source: int, epoch: int) -> Epoch:
        """Return the order of the blocks of a source in one of its own epochs."""
        found = self._epochs.get((source, epoch))
        if found is None:
            facts = self._sources[source]
            order = Order(
                samples=facts.samples,
                seed=self._keys[source],
                lanes=1,
                window=1,
                block_rows=facts.block_rows,
            )
            found = self._epochs[source, epoch] = Epoch(order, epoch)
            if len(self._epochs) > MOST_EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        return found


def source_epochs(order: Order, epoch: int, position: int) -> dict[str, float]:
    """Return, by source, how many of its own epochs were served up to a position of an epoch.

    Empty where the order is of no mixture.
    """
    if order.mixture is None:
        return {}
    consumed = MixedEpoch(order, epoch).pattern.consumed(position)
    sources = order.mixture.sources
    return {each.name: count / each.samples for each, count in zip(sources, consumed, strict=True)}
