"""Types of arrays, and arithmetic on runs of consecutive rows, whatever the length of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]


def within(counts: Int64s) -> Int64s:
    """Return 0 to count - 1 for each of these counts, (sum of counts,) int64."""
    return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)


def groups_of(sizes: Int64s, most: int) -> Iterator[slice]:
    """Yield runs of items of at most so much together, or a single one that is more."""
    stops = np.cumsum(sizes)
    start = 0
    while start < len(sizes):
        before = int(stops[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(stops, before + most, side="right")))
        yield slice(start, stop)
        start = stop


def run_starts(begins: npt.NDArray[np.bool_], amounts: Int64s, most: int) -> npt.NDArray[np.bool_]:
    """Return where items begin a run, when runs of more than about so much are cut.

    Args:
        begins: (items,) bool, where one begins anyway; the first is one.
        amounts: (items,) int64, of each.
        most: of a run, but for its last item.
    """
    firsts = np.flatnonzero(begins)[np.cumsum(begins) - 1]
    before = np.cumsum(amounts) - amounts
    part = (before - before[firsts]) // most
    begins = begins.copy()
    begins[1:] |= part[1:] != part[:-1]
    return begins


def as_slice(indices: Int64s) -> slice | Int64s:
    """Return indices that follow each other as a slice, for which numpy makes no copy."""
    first, last = int(indices[0]), int(indices[-1])
    if last - first + 1 == len(indices) and (np.diff(indices) == 1).all():
        return slice(first, last + 1)
    return indices


class Pieces(NamedTuple):
    """Runs of rows, none of which leaves its shard: arrays of int64 of the same length.

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
