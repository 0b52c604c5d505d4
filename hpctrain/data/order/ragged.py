"""Runs of different lengths, one after the other in one array."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

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
