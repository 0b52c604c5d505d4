"""Which rows of the files become samples: pure arithmetic over spans of rows.

A span is a run of consecutive rows. So what is kept in memory grows with the number of spans, two
numbers each, and never with the number of samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hpctrain.data.arrays import Int64s, within
from hpctrain.data.order.permutation import derive_key, permutation

MOST_SPANS = 2**22
"""Spans that a selection may have: 64 MB on every rank."""
MOST_PIECES = 2**16
"""Pieces into which a dataset is cut to be split at random, at most."""
PIECE_BYTES = 2**20
"""A large dataset is cut into pieces of about so much, to be read in one go."""
FEWEST_PIECES = 1000
"""Rows are split one by one rather than cut a dataset into fewer pieces than this."""
WINDOWS_PER_PIECE = 10
"""Where samples are windows, a piece is so many times as long: its end is lost to them."""
# What a key is for: which pieces a part gets has nothing to do with the order of an epoch.
_SPLIT = 2


class Spans(NamedTuple):
    """Runs of consecutive rows, ascending and apart.

    Attributes:
        starts: (spans,) int64, the first row of each.
        stops: (spans,) int64, one past its last row.
    """

    starts: Int64s
    stops: Int64s

    @classmethod
    def of(cls, start: int, stop: int) -> Spans:
        """Return one span."""
        return cls(np.array([start], np.int64), np.array([stop], np.int64))

    @property
    def rows(self) -> int:
        return int((self.stops - self.starts).sum())


@dataclass(frozen=True)
class SampleSelection:
    """Samples as rows: in each of some runs, every `stride`-th row is the first one of a sample.

    Attributes:
        firsts: (runs,) int64, the row of the first sample of each run.
        counts: (runs,) int64, samples in each run, none of them 0.
        stride: rows from one sample of a run to the next.
    """

    firsts: Int64s
    counts: Int64s
    stride: int = 1

    @classmethod
    def of(cls, spans: Spans, reach: int, stride: int) -> SampleSelection:
        """Return the samples that lie whole within spans, each `reach` rows long."""
        counts = (spans.stops - spans.starts - reach) // stride + 1
        has_any = counts > 0
        return cls(spans.starts[has_any], counts[has_any], stride)

    @cached_property
    def stops(self) -> Int64s:
        """One past the last sample of every run, (runs,) int64."""
        return np.cumsum(self.counts, dtype=np.int64)

    @property
    def samples(self) -> int:
        return int(self.stops[-1]) if len(self.stops) else 0

    def rows(self, samples: Int64s) -> Int64s:
        """Return the row of each of these samples, (count,) int64."""
        runs = np.searchsorted(self.stops, samples, side="right")
        inside = samples - self.stops[runs] + self.counts[runs]
        return self.firsts[runs] + inside * self.stride

    def locate(
        self, samples: Int64s, counts: Int64s, places: Int64s
    ) -> tuple[Int64s, Int64s, Int64s]:
        """Cut runs of samples where a run of rows ends.

        Args:
            samples: (given,) int64, the first sample of each run.
            counts: (given,) int64, samples in each.
            places: (given,) int64, where each goes.

        Returns:
            Row of the first sample, number of samples and place of each piece, int64 each.
        """
        first_runs = np.searchsorted(self.stops, samples, side="right")
        last_runs = np.searchsorted(self.stops, samples + counts - 1, side="right")
        pieces = last_runs - first_runs + 1
        owners = np.repeat(np.arange(len(samples)), pieces)
        runs = first_runs[owners] + within(pieces)
        begins = np.maximum(samples[owners], self.stops[runs] - self.counts[runs])
        ends = np.minimum((samples + counts)[owners], self.stops[runs])
        return self.rows(begins), ends - begins, places[owners] + begins - samples[owners]


def spans_where(flags: npt.NDArray[np.bool_], first_row: int = 0) -> Spans:
    """Return the spans of rows that are True, of a mask whose first row is `first_row`."""
    edges = np.flatnonzero(np.diff(flags, prepend=False, append=False)) + first_row
    return Spans(edges[::2].astype(np.int64), edges[1::2].astype(np.int64))


def merged(parts: list[Spans]) -> Spans:
    """Return ascending spans as one, those that touch put together."""
    starts = np.concatenate([part.starts for part in parts])
    stops = np.concatenate([part.stops for part in parts])
    if not len(starts):
        return Spans(starts, stops)
    apart = starts[1:] != stops[:-1]
    return Spans(starts[np.append(True, apart)], stops[np.append(apart, True)])


def common(one: Spans, other: Spans) -> Spans:
    """Return the rows that are in both."""
    borders = np.unique(np.concatenate([*one, *other]))
    inside = np.ones(max(0, len(borders) - 1), bool)
    for spans in (one, other):
        # A border opens a span, or lies in one, if more spans have begun than ended.
        begun = np.searchsorted(spans.starts, borders[:-1], side="right")
        inside &= begun > np.searchsorted(spans.stops, borders[:-1], side="right")
    return Spans(borders[:-1][inside], borders[1:][inside])


def cut(spans: Spans, borders: Int64s) -> Spans:
    """Cut spans at borders between rows, such as the ends of files."""
    stops = np.unique(borders)
    starts = np.concatenate(([0], stops[:-1])).astype(np.int64)
    return common(spans, Spans(starts, stops))


def default_piece_rows(rows: int, row_bytes: int, reach: int) -> int:
    """Return how many consecutive rows stay in one part of a split."""
    large = min(rows // FEWEST_PIECES, PIECE_BYTES // row_bytes)
    windows = WINDOWS_PER_PIECE * reach if reach > 1 else 1
    return max(1, -(-rows // MOST_PIECES), large, windows)


def split_pieces(stops: Int64s, fraction: float, seed: int) -> tuple[Spans, Spans]:
    """Split pieces of rows in two, at random, the same on every machine.

    Args:
        stops: (pieces,) int64, one past the last row of each piece; at least two.
        fraction: of the rows that the second part gets, about.
        seed: another one gives another split.

    Returns:
        The rows of the first part and of the second; none of them is without any.
    """
    starts = np.concatenate(([0], stops[:-1])).astype(np.int64)
    order = permutation(derive_key(seed, _SPLIT), len(stops))
    taken = np.cumsum((stops - starts)[order])
    nearest = int(np.argmin(np.abs(taken - fraction * int(stops[-1]))))
    is_second = np.zeros(len(stops), bool)
    is_second[order[: min(nearest + 1, len(stops) - 1)]] = True
    first, second = (
        merged([Spans(starts[chosen], stops[chosen])]) for chosen in (~is_second, is_second)
    )
    return first, second


def piece_stops(rows: int, piece_rows: int) -> Int64s:
    """Return one past the last row of every piece of so many rows, (pieces,) int64."""
    stops = np.arange(piece_rows, rows + piece_rows, piece_rows, dtype=np.int64)
    return np.minimum(stops, rows)
