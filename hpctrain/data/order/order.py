"""The sampler: order of the samples, each rank's share of a batch; O(1) to any position.

An epoch is one stream of all samples. Position k of it is row k // lanes of lane k % lanes, and a
global batch is the next `global_batch_size` positions. So a batch is a function of the seed, the
epoch, the position and the sizes here, and of nothing else: not of the number of ranks, nor of
where a run was stopped. Ranks share the lanes among them, which decides who reads a sample and
never when.

What the lanes hold is drawn for each epoch: blocks of consecutive rows are permuted and dealt to
the lanes, and inside a lane a few blocks at a time, a window, are permuted row by row.

A sequential order is that of the dataset's rows in every epoch, and a weighted one draws every
position on its own. They have no lanes: ranks share every batch in runs of positions.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hpctrain.config.limits import limited
from hpctrain.data.arrays import Int64s, UInt64s
from hpctrain.data.dataset import DatasetFacts, SourceFacts
from hpctrain.data.order.mixture import (
    MixedSource,
    Mixture,
    Pattern,
    Standing,
    Terms,
    round_rows_of,
)
from hpctrain.data.order.permutation import derive_key, derive_keys
from hpctrain.errors import ConfigError

FEWEST_LANES = 64
MOST_LANES = 4096
WINDOWS_BYTES = 128 * 2**20
"""Bytes of the windows of all lanes together: large enough for large reads, yet held in memory."""
MOST_RESIDENT_BLOCKS = 2**19
"""Blocks of a dataset that is in memory: their permutation takes 4 MB."""
BLOCKS_PER_LANE = 16
"""A lane holds at least so many blocks, or blocks are shorter: small data stay well shuffled."""
Sampling = Literal["shuffled", "sequential", "weighted"]
"""How the rows of the dataset become the stream of an epoch."""
# What a key is for: the permutations of blocks and of windows, and draws of samples share nothing.
KEY_OF_BLOCKS, KEY_OF_WINDOWS, KEY_OF_SAMPLES = 0, 1, 2


def default_lanes(global_batch_size: int) -> int:
    """Return the power of two at or above the global batch size, at least 64, at most 4096."""
    lanes = FEWEST_LANES
    while lanes < min(global_batch_size, MOST_LANES):
        lanes *= 2
    return lanes


def default_block_rows(
    samples: int, row_bytes: int, lanes: int, window: int, chunk_rows: int = 1
) -> int:
    """Return how many consecutive rows to read at once.

    The windows of all lanes together stay within a constant budget, and a lane of a small dataset
    still mixes several blocks; where neither binds, a block is a whole number of chunks. Half as
    many blocks in a lane are still well mixed: better that than a chunk in several blocks, each of
    which decompresses all of it.
    """
    affordable = WINDOWS_BYTES // (lanes * window * row_bytes)
    mixing = samples // (lanes * BLOCKS_PER_LANE)
    rows = max(1, min(affordable, mixing))
    if rows >= chunk_rows:
        return rows - rows % chunk_rows
    return chunk_rows if chunk_rows <= min(affordable, 2 * mixing) else rows


def resident_block_rows(samples: int) -> int:
    """Return the block size of a dataset in memory: one row, while the plan stays small."""
    return -(-samples // MOST_RESIDENT_BLOCKS)


def served_samples(
    samples: int, global_batch_size: int, drop_last: bool, limit: float | None = None
) -> int:
    """Return how many samples of an epoch are served.

    Args:
        samples: of its stream.
        global_batch_size: of a full batch.
        drop_last: leave out a last, smaller batch.
        limit: serve so many batches, or with a float such a part of them; None: all.
    """
    served = samples - samples % global_batch_size if drop_last else samples
    return min(served, global_batch_size * limited(-(-served // global_batch_size), limit))


def lanes_of_rank(rank: int, world_size: int, lanes: int) -> range:
    """Return the lanes that a rank serves.

    They are dealt in turn, so that the ranks' shares of any run of positions are as equal as can
    be, also of a batch that is smaller than the number of lanes. Runs of neighbouring lanes would
    leave some ranks idle there.
    """
    return range(rank, lanes, world_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """The order of all epochs of a dataset.

    Attributes:
        samples: of the dataset.
        seed: 0 to 2**64 - 1; another seed gives another order.
        lanes: runs of equal length, of which the stream takes one sample each in turn.
        window: blocks of a lane that are shuffled together.
        block_rows: consecutive rows that stay together up to there, and are read in one go.
        sampling: other orders than a shuffled one make no use of the three above.
        draws: samples of an epoch that is drawn by weight, or mixed; None: as many as the dataset
            has.
        weights: their fingerprint.
        mixture: of which the dataset is made, and where its sources stand; None: it is one.
    """

    samples: int
    seed: int
    lanes: int
    window: int
    block_rows: int
    sampling: Sampling = "shuffled"
    draws: int | None = None
    weights: str | None = None
    mixture: Mixture | None = None

    @classmethod
    def for_dataset(
        cls,
        dataset: DatasetFacts,
        *,
        seed: int,
        global_batch_size: int,
        lanes: int | None = None,
        window: int = 4,
        is_resident: bool = False,
        sampling: Sampling = "shuffled",
        draws: int | None = None,
        weights: str | None = None,
    ) -> Order:
        """Choose what was not chosen, from the dataset and the global batch size alone.

        Data that are resident in memory cost the same in any order: they are shuffled row by row.
        """
        lanes = default_lanes(global_batch_size) if lanes is None else lanes
        if sampling != "shuffled":
            block_rows = 1
        elif is_resident:
            block_rows = resident_block_rows(dataset.samples)
        else:
            block_rows = default_block_rows(
                dataset.samples, dataset.bytes_per_sample, lanes, window, dataset.chunk_rows
            )
        return cls(
            samples=dataset.samples,
            seed=seed,
            lanes=lanes,
            window=window,
            block_rows=block_rows,
            sampling=sampling,
            draws=draws,
            weights=weights,
        )

    @classmethod
    def for_mixture(
        cls,
        facts: Sequence[SourceFacts],
        terms: Terms,
        *,
        seed: int,
        global_batch_size: int,
        length: int,
        lanes: int | None = None,
        window: int = 4,
        is_resident: bool = False,
        sampling: Sampling = "shuffled",
        begun: Mapping[str, int] | None = None,
    ) -> Order:
        """Choose what was not chosen, from the sources and the global batch size alone.

        Args:
            facts: of the sources, by name ascending.
            terms: of the mixture.
            seed: of the run.
            global_batch_size: samples of all ranks in one batch.
            length: samples of an epoch.
            lanes: of the order; None: the default.
            window: blocks that are shuffled together.
            is_resident: whether the data are in memory.
            sampling: "shuffled", or "sequential": each source in the order of its rows.
            begun: block rows of sources that a run has begun with; it keeps them.
        """
        lanes = default_lanes(global_batch_size) if lanes is None else lanes
        blocks = {
            each.name: 1
            if is_resident or sampling != "shuffled"
            else default_block_rows(
                each.samples, each.bytes_per_sample, lanes, window, each.chunk_rows
            )
            for each in facts
        } | dict(begun or {})
        sources = tuple(
            MixedSource(
                name=each.name,
                samples=each.samples,
                fingerprint=each.fingerprint,
                block_rows=blocks[each.name],
            )
            for each in facts
        )
        block_rows = max(blocks.values())
        mixture = Mixture(
            sources=sources,
            terms=terms,
            start=Standing(consumed=(0,) * len(sources)),
            round_rows=round_rows_of(block_rows, lanes, window),
        )
        return cls(
            samples=sum(each.samples for each in facts),
            seed=seed,
            lanes=lanes,
            window=window,
            block_rows=block_rows,
            sampling=sampling,
            draws=length,
            mixture=mixture,
        )

    def after(self, begun: Order, ended: Pattern) -> Order:
        """Return this order of a mixture for the epoch after one that has ended.

        The sources go on in their own epochs, and so by the seed that those were begun with.
        """
        assert self.mixture is not None
        mixture = ended.mixture.from_standing(ended.following(), self.mixture.round_rows)
        return dataclasses.replace(self, seed=begun.seed, mixture=mixture)

    @property
    def has_lanes(self) -> bool:
        """Whether ranks share lanes; else they share every batch in runs of positions."""
        return self.sampling == "shuffled"

    @property
    def length(self) -> int:
        """Samples of an epoch's stream."""
        return self.samples if self.draws is None else self.draws

    @property
    def num_blocks(self) -> int:
        return -(-self.samples // self.block_rows)

    @property
    def longest_window_rows(self) -> int:
        """Rows of the longest window that there can be."""
        return min(self.window * self.block_rows, -(-self.samples // self.lanes))

    def batches_ahead(self, global_batch_size: int) -> int:
        """Return how many batches after one the windows reach into that it needs, at most."""
        if self.block_rows == 1:
            return 0
        if self.mixture is not None:
            return -(-self.lanes * self.mixture.round_rows // global_batch_size)
        return -(-self.lanes * self.longest_window_rows // global_batch_size)

    def lane_samples(self, lanes: Int64s) -> Int64s:
        """Return the number of samples in each of these lanes, (count,) int64."""
        return (self.samples - lanes + self.lanes - 1) // self.lanes

    def lane_starts(self, lanes: Int64s) -> Int64s:
        """Return the number of samples in all lanes before each of these, (count,) int64."""
        shortest, longer = divmod(self.samples, self.lanes)
        return lanes * shortest + np.minimum(lanes, longer)

    def require_world_size(self, world_size: int) -> None:
        """Check that every rank has a lane.

        Raises:
            ConfigError: naming the number to set.
        """
        if self.has_lanes and world_size > self.lanes:
            raise ConfigError(
                f"data.lanes = {self.lanes}, but there are {world_size} ranks, and each needs a "
                f"lane: set data.lanes to {default_lanes(world_size)} "
                f"(at least {world_size}), or start at most {self.lanes} ranks"
            )

    def shares(self, start: int, stop: int, world_size: int) -> Int64s:
        """Return how many of the positions start to stop - 1, one batch, each rank serves.

        Returns:
            (world_size,) int64.
        """
        if not self.has_lanes:
            return np.diff(_cuts(start, stop, world_size))
        return self._served_before(stop, world_size) - self._served_before(start, world_size)

    def largest_share(self, global_batch_size: int, world_size: int) -> int:
        """Return the most samples that any rank serves of any full batch, wherever it starts."""
        size = min(global_batch_size, self.length)
        return max(
            int(self.shares(start, start + size, world_size).max()) for start in self._starts
        )

    def largest_share_of_group(self, global_batch_size: int, batches: int, world_size: int) -> int:
        """Return the most samples that any rank serves of so many batches in a row."""
        if self.has_lanes:
            return self.largest_share(global_batch_size * batches, world_size)
        return self.largest_share(global_batch_size, world_size) * batches

    def smallest_share(
        self, global_batch_size: int, epoch_size: int, world_size: int, begin: int = 0
    ) -> int:
        """Return the fewest samples that any rank serves of any batch, the last of an epoch too.

        Args:
            global_batch_size: samples of all ranks in one batch.
            epoch_size: samples of all ranks that an epoch serves.
            world_size: number of ranks.
            begin: position in the epoch of the first batch: after a change of the batch size in its
                middle the last one is another than in epochs from 0.
        """
        size = min(global_batch_size, self.length)
        bounds = [(start, start + size) for start in self._starts]
        if rest := (epoch_size - begin) % size:
            bounds.append((epoch_size - rest, epoch_size))
        return min(int(self.shares(*each, world_size).min()) for each in bounds)

    def positions(self, start: int, stop: int, rank: int, world_size: int) -> Int64s:
        """Return those of the positions start to stop - 1, one batch, that a rank serves, in order.

        Returns:
            (share,) int64.
        """
        if start >= stop:
            return np.empty(0, np.int64)
        if not self.has_lanes:
            cuts = _cuts(start, stop, world_size)
            return np.arange(cuts[rank], cuts[rank + 1], dtype=np.int64)
        first_row = start // self.lanes
        rows = np.arange(first_row, (stop - 1) // self.lanes + 1, dtype=np.int64)
        lanes = np.array(lanes_of_rank(rank, world_size, self.lanes), np.int64)
        positions = (rows[:, None] * self.lanes + lanes).ravel()
        return positions[slice(*np.searchsorted(positions, (start, stop)))]

    def sample_keys(self, epoch: int, positions: Int64s, rows: Int64s) -> UInt64s:
        """Return the keys that random transforms of an epoch's samples draw from.

        A row that comes twice in an epoch gets another key each time.

        Args:
            epoch: from 0.
            positions: (count,) int64, of the samples in the stream.
            rows: (count,) int64, which rows of the dataset they are.

        Returns:
            (count,) uint64.
        """
        may_repeat = self.sampling == "weighted" or self.mixture is not None
        return sample_keys(self.seed, epoch, positions if may_repeat else rows)

    def positions_of_group(self, bounds: Sequence[int], rank: int, world_size: int) -> Int64s:
        """Return the positions that a rank serves of batches that follow each other, in order.

        Args:
            bounds: position of the first sample of each batch, and one past the last of all.
            rank: which one.
            world_size: number of ranks.

        Returns:
            (samples of the rank,) int64.
        """
        if self.has_lanes:
            return self.positions(bounds[0], bounds[-1], rank, world_size)
        parts = [self.positions(*each, rank, world_size) for each in itertools.pairwise(bounds)]
        return np.concatenate(parts)

    @property
    def _starts(self) -> range:
        """Where batches begin, as far as it matters to the shares of the ranks."""
        return range(self.lanes if self.has_lanes else 1)

    def _served_before(self, position: int, world_size: int) -> Int64s:
        """Return how many positions below this one each rank serves, (world_size,) int64."""
        full_rows, rest = divmod(position, self.lanes)
        ranks = np.arange(world_size, dtype=np.int64)
        # Of `count` consecutive lanes from lane 0, rank r serves ceil((count - r) / world_size).
        per_row = -((ranks - self.lanes) // world_size)
        in_rest = np.maximum(0, -((ranks - rest) // world_size))
        return full_rows * per_row + in_rest


def _cuts(start: int, stop: int, world_size: int) -> Int64s:
    """Return where a batch is cut into runs for the ranks, (world_size + 1,) int64."""
    return start + (stop - start) * np.arange(world_size + 1, dtype=np.int64) // world_size


def sample_keys(seed: int, epoch: int, rows: Int64s) -> UInt64s:
    """Return the keys that random transforms of samples draw from.

    Args:
        seed: of the run.
        epoch: from 0.
        rows: (count,) int64, which rows of the dataset the samples are.

    Returns:
        (count,) uint64.
    """
    return derive_keys(derive_key(seed, epoch, KEY_OF_SAMPLES), rows)
