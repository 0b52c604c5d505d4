"""Runs of different lengths, one after the other in one array."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from hpctrain.data.order.permutation import Int64s


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
