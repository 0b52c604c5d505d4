"""Several sources in one stream of samples, by weight: pure arithmetic, O(1) to any position.

Which source serves a position is decided row by row of the lanes. A row holds as many samples of
a source as bring what it has served closest to its weight, so proportions hold at every length and
not by chance; and they are spread over the lanes so evenly that every rank gets its part of each.
A source is served in its own order, epoch after epoch of its own. So a counter for each source, and
where the running round began, say all about what comes next, at any number of ranks.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hpctrain.data.arrays import Int64s
from hpctrain.data.order.permutation import derive_key, derive_keys

MOST_ROUND_SAMPLES = 2**16
"""Samples whose places are drawn up together, at most: some 100 bytes each."""
GOLDEN = (math.sqrt(5) - 1) / 2
"""Steps of this part of a circle come evenly close to all of it. Source: Weyl (1916)."""
# What a key is for: order.py and weights.py have 0 to 3.
_TURNS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedSource:
    """One of the sources of a mixture, for the life of the run.

    Attributes:
        name: which its order depends on, so that other sources may come and go.
        samples: of it.
        fingerprint: of its data.
        block_rows: consecutive rows of it that stay together.
    """

    name: str
    samples: int
    fingerprint: str
    block_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """By what the sources are mixed: what a config may change at a restart.

    Attributes:
        weights: of the sources, at least one above 0.
        repeats: for each whether it begins again once all of it was served, or leaves the mixture.
    """

    weights: tuple[float, ...]
    repeats: tuple[bool, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where the sources stand at a position of an epoch.

    Attributes:
        position: at which a round begins.
        since: samples since the terms in force began.
        consumed: samples of each source that all ranks together have served since the run began.
    """

    position: int = 0
    since: int = 0
    consumed: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """The sources of an epoch, and where they stand at its first known round.

    Attributes:
        sources: by name, ascending, as their rows follow each other in the dataset.
        terms: of the first round.
        start: of that round.
        later: the terms of all rounds after it; None: the same.
        round_rows: rows of the lanes that are drawn up together.
    """

    sources: tuple[MixedSource, ...]
    terms: Terms
    start: Standing
    later: Terms | None = None
    round_rows: int = 1

    @property
    def newest(self) -> Terms:
        """The terms that hold on."""
        return self.later or self.terms

    def from_standing(self, standing: Standing, round_rows: int) -> Mixture:
        """Return the same sources, by the newest terms, from where an epoch begins."""
        return dataclasses.replace(
            self, terms=self.newest, start=standing, later=None, round_rows=round_rows
        )


def round_rows_of(block_rows: int, lanes: int, window: int) -> int:
    """Return how many rows of the lanes make a round: about a window of blocks of every lane."""
    if block_rows == 1:
        return 1
    return max(1, min(window * block_rows, MOST_ROUND_SAMPLES // lanes))


def apportioned(totals: Int64s, weights: npt.NDArray[np.float64]) -> Int64s:
    """Return how many of the first so many samples are of each source.

    The first source takes its part of all, the second its part of what is left, and so on. So each
    number grows by 0 or 1 where the total grows by 1, and none is further from its weight than
    1 + ln(sources). Products and sums of float64 are the same on every machine.

    Args:
        totals: (count,) int64, at least 0.
        weights: (sources,) float64, at least one above 0.

    Returns:
        (count, sources) int64, whose rows add up to the totals.
    """
    left_weight = np.cumsum(weights[::-1])[::-1]
    left = totals.copy()
    parts = np.zeros((len(totals), len(weights)), np.int64)
    for index in np.flatnonzero(weights).tolist():
        share = weights[index] / left_weight[index]
        taken = np.floor(left * share + 0.5).astype(np.int64)
        parts[:, index] = np.minimum(taken, left, out=taken)
        left -= taken
    return parts


def spread_step(length: int) -> int:
    """Return by how much the place of neighbours in a row of lanes differs: all are reached."""
    step = max(1, round(length * GOLDEN))
    while math.gcd(step, length) != 1:
        step += 1
    return step


class _Stage(NamedTuple):
    """Rows of lanes by one set of weights.

    Attributes:
        first: row.
        stop: one past the last row.
        since: samples since the terms in force began, at the first row.
        weights: (sources,) float64; 0 of those that are not served any more.
        consumed: (sources,) int64, before the first row.
        fixed: (sources,) int64, samples of a single row in which a source ends; None: by weight.
        terms: which they come from.
    """

    first: int
    stop: int
    since: int
    weights: npt.NDArray[np.float64]
    consumed: Int64s
    fixed: Int64s | None
    terms: Terms


class Pattern:
    """Which source serves each position of an epoch, and which of its samples in its own stream."""

    def __init__(self, mixture: Mixture, *, lanes: int, length: int, seed: int, epoch: int) -> None:
        """Draw up the stages of an epoch.

        Args:
            mixture: of the epoch.
            lanes: positions of a row.
            length: positions of the epoch; its last row may be shorter.
            seed: of the run.
            epoch: from 0.
        """
        self.mixture = mixture
        self.lanes = lanes
        self.length = length
        self.round_samples = mixture.round_rows * lanes
        self._key = derive_key(seed, epoch, _TURNS)
        self._sizes = np.array([each.samples for each in mixture.sources], np.int64)
        self._stages = self._draw_up()
        self._firsts = np.array([stage.first for stage in self._stages], np.int64)

    def standing(self, position: int) -> Standing:
        """Return where the sources stand when the round of a position begins."""
        first = position - (position - self.mixture.start.position) % self.round_samples
        row = first // self.lanes
        stage = self._stage_of(row)
        return Standing(
            position=first,
            since=stage.since + (row - stage.first) * self.lanes,
            consumed=tuple(self._before(np.array([row]))[0].tolist()),
        )

    def terms_at(self, position: int) -> Terms:
        """Return the terms by which a position is served."""
        return self._stage_of(position // self.lanes).terms

    def consumed(self, position: int) -> tuple[int, ...]:
        """Return how many samples of each source all positions below this one have served."""
        row, inside = divmod(position, self.lanes)
        counts = self._before(np.array([row]))[0]
        if inside:
            served, _ = self.of_rows(np.array([row]))
            counts = counts + np.bincount(served[0, :inside], minlength=len(counts))
        return tuple(counts.tolist())

    def following(self) -> Standing:
        """Return where the sources stand when the next epoch begins."""
        stage = self._stages[-1]
        since = stage.since + self.length - stage.first * self.lanes
        # A source that ended in the last row leaves: what follows is another set of weights.
        return Standing(
            since=0 if stage.fixed is not None else since, consumed=self.consumed(self.length)
        )

    def of_rows(self, rows: Int64s) -> tuple[Int64s, Int64s]:
        """Return the source of every position of rows of lanes, and which of its samples it is.

        Args:
            rows: (count,) int64, none before the first known round.

        Returns:
            Index of the source, and samples of it that were served before since the run began,
            (count, lanes) int64 both; what is beyond the end of the epoch means nothing.
        """
        before = self._before(rows)
        edges = np.cumsum(self._before(rows + 1) - before, axis=1)
        lengths = edges[:, -1:]
        steps = np.where(
            lengths == self.lanes, spread_step(self.lanes), spread_step(int(lengths.min()))
        )
        turns = (derive_keys(self._key, rows)[:, None] % lengths.astype(np.uint64)).astype(np.int64)
        slots = (np.arange(self.lanes) * steps + turns) % lengths
        sources = np.zeros_like(slots)
        for edge in edges.T[:-1]:
            sources += slots >= edge[:, None]
        ordinals = np.empty_like(slots)
        for index in range(len(self._sizes)):
            here = sources == index
            ordinals[here] = (before[:, index, None] + np.cumsum(here, axis=1) - 1)[here]
        return sources, ordinals

    def of_round(self, position: int) -> tuple[int, Int64s, Int64s]:
        """Return the first position of the round of one, and what its positions hold.

        The samples of a source in a round are dealt to the lanes in runs, one after the other, so
        that a rank reads neighbours; inside a run they are shuffled. Samples of one epoch of a
        source and of its next are not mixed: all of one come before any of the other.

        Returns:
            The first position; and of each, its source and the place in the source's own stream,
            (positions,) int64.
        """
        first = position - (position - self.mixture.start.position) % self.round_samples
        stop = min(first + self.round_samples, self.length)
        rows = np.arange(first // self.lanes, -(-stop // self.lanes), dtype=np.int64)
        sources, ordinals = (each.ravel()[: stop - first] for each in self.of_rows(rows))
        if self.mixture.round_rows == 1:
            return first, sources, ordinals
        positions = np.arange(first, stop, dtype=np.int64)
        in_order = np.argsort(sources, kind="stable")
        epochs = (ordinals // self._sizes[sources])[in_order]
        begins = np.diff(sources[in_order], prepend=-1) != 0
        begins |= np.diff(epochs, prepend=-1) != 0
        groups = np.empty(len(positions), np.int64)
        groups[in_order] = np.cumsum(begins) - 1
        runs = groups * self.lanes + positions % self.lanes
        bits = np.uint64(max(1, int(runs.max()).bit_length()))
        hashes = derive_keys(self._key, positions) >> bits
        dealt = np.argsort(
            (runs.astype(np.uint64) << (np.uint64(64) - bits)) | hashes, kind="stable"
        )
        places = np.empty_like(ordinals)
        places[dealt] = ordinals[in_order]
        return first, sources, places

    def _draw_up(self) -> list[_Stage]:
        """Return the stages of the epoch: others begin where terms change, or a source ends."""
        mixture, rows = self.mixture, -(-self.length // self.lanes)
        row = mixture.start.position // self.lanes
        stages: list[_Stage] = []
        changes = rows if mixture.later is None else min(rows, row + mixture.round_rows)
        since, consumed = mixture.start.since, np.array(mixture.start.consumed, np.int64)
        for terms, until in ((mixture.terms, changes), (mixture.newest, rows)):
            ends = ~np.array(terms.repeats)
            # One that ends does so with the epoch of its own that it is in.
            limits = self._sizes * np.maximum(1, -(-consumed // self._sizes))
            limits[~ends] = np.iinfo(np.int64).max
            while row < until:
                weights = np.where(consumed >= limits, 0.0, terms.weights)
                whole = _Stage(row, until, since, weights, consumed, None, terms)
                stop = self._last_row_within(whole, limits)
                if stop > row:
                    stages.append(whole._replace(stop=stop))
                    consumed = self._served(whole, np.array([stop]))[0]
                    since += self._samples_of(row, stop)
                if stop < until:
                    counts = self._served(whole, np.array([stop + 1]))[0] - consumed
                    counts = _clipped(counts, limits - consumed, weights)
                    stages.append(_Stage(stop, stop + 1, since, weights, consumed, counts, terms))
                    consumed, since, stop = consumed + counts, 0, stop + 1
                row = stop
            since = 0
        return stages

    def _last_row_within(self, stage: _Stage, limits: Int64s) -> int:
        """Return the row up to which no source has served more than its limit."""
        if (limits == np.iinfo(np.int64).max).all():
            return stage.stop
        low, high = stage.first, stage.stop
        while low < high:
            middle = (low + high + 1) // 2
            served = self._served(stage, np.array([middle]))[0]
            if (served > limits).any():
                high = middle - 1
            else:
                low = middle
        return low

    def _samples_of(self, first: int, stop: int) -> int:
        return min(stop * self.lanes, self.length) - first * self.lanes

    def _served(self, stage: _Stage, rows: Int64s) -> Int64s:
        """Return what sources have served before rows of a stage, (count, sources) int64."""
        if stage.fixed is not None:
            return stage.consumed + np.outer(rows - stage.first, stage.fixed)
        positions = np.minimum(rows * self.lanes, self.length) - stage.first * self.lanes
        totals = np.append(stage.since, stage.since + positions)
        parts = apportioned(totals, stage.weights)
        served: Int64s = stage.consumed + parts[1:] - parts[0]
        return served

    def _before(self, rows: Int64s) -> Int64s:
        """Return what sources have served before rows, (count, sources) int64."""
        which = np.maximum(np.searchsorted(self._firsts, rows, side="right") - 1, 0)
        served = np.empty((len(rows), len(self._sizes)), np.int64)
        for index in np.unique(which).tolist():
            mine = which == index
            served[mine] = self._served(self._stages[index], rows[mine])
        return served

    def _stage_of(self, row: int) -> _Stage:
        index = int(np.searchsorted(self._firsts, row, side="right")) - 1
        return self._stages[max(index, 0)]


def _clipped(
    counts: Int64s,
    left: Int64s,
    weights: npt.NDArray[np.float64],
) -> Int64s:
    """Return the samples of each source in a row, none of more than it has; others fill it up."""
    total = int(counts.sum())
    weights = weights.copy()
    counts = np.array(counts)
    while (over := counts > left).any():
        weights[over] = 0.0
        counts[over] = left[over]
        others = weights > 0
        rest = total - int(counts[~others].sum())
        counts[others] = apportioned(np.array([rest]), weights)[0][others]
    return counts
