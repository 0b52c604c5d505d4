"""One epoch of a mixture: where in the dataset the samples of its stream are. Pure arithmetic."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import xxhash

from hpctrain.data.mixture import MOST_ROUND_SAMPLES, Pattern
from hpctrain.data.order import Epoch, Order
from hpctrain.data.permutation import Int64s, derive_key

MOST_EPOCHS_KEPT = 64
"""Epochs of sources whose order is kept: each has one number per block."""
MOST_ROUNDS_KEPT = 2


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
