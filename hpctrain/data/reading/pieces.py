"""Runs of rows, none of which leaves its shard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpctrain.data.order.permutation import Int64s
from hpctrain.data.order.ragged import within

Bytes = npt.NDArray[np.uint8]


class Pieces(NamedTuple):
    """Many of them, each an array of int64 of the same length.

    Attributes:
        shards: indices.
        firsts: the first row of each, counted in its shard.
        counts: rows.
        places: where in the output each goes.
    """

    shards: Int64s
    firsts: Int64s
    counts: Int64s
    places: Int64s

    @classmethod
    def joined(cls, parts: Sequence[Pieces]) -> Pieces:
        """Return all pieces of these, at least one of them."""
        return cls(*map(np.concatenate, zip(*parts, strict=True)))

    def only(self, which: Any) -> Pieces:
        """Return some of them, by index or mask."""
        return Pieces(*(each[which] for each in self))

    def cut(self, rows: Int64s) -> Pieces:
        """Cut each where a multiple of so many rows of its shard begins: (pieces,) int64."""
        _, firsts, counts, places = self
        before = firsts // rows
        parts = (firsts + counts - 1) // rows - before + 1
        owners = np.repeat(np.arange(len(parts)), parts)
        begins = (before[owners] + within(parts)) * rows[owners]
        inside = np.maximum(begins - firsts[owners], 0)
        stops = np.minimum(begins + rows[owners] - firsts[owners], counts[owners])
        return Pieces(
            self.shards[owners], firsts[owners] + inside, stops - inside, places[owners] + inside
        )

    def singly(self) -> Pieces:
        """Return every row as a piece of its own."""
        inside = within(self.counts)
        shards, firsts, counts, places = (np.repeat(each, self.counts) for each in self)
        return Pieces(shards, firsts + inside, np.ones_like(counts), places + inside)

    def merged(self) -> Pieces:
        """Return the same rows in fewer pieces, where some follow each other."""
        shards, firsts, counts, places = self
        begins = np.ones(len(shards), bool)
        begins[1:] = (np.diff(shards) != 0) | (np.diff(firsts) != counts[:-1])
        begins[1:] |= np.diff(places) != counts[:-1]
        starts = np.flatnonzero(begins)
        totals = np.add.reduceat(counts, starts) if len(starts) else counts
        return Pieces(shards[starts], firsts[starts], totals, places[starts])

    def listed(self) -> list[tuple[int, int, int, int]]:
        """Return shard, first row, rows and place of each."""
        return list(zip(*(each.tolist() for each in self), strict=True))
