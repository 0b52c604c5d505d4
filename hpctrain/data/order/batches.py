"""Batches of one rank: of every epoch to train on, and of an evaluation. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from hpctrain.data.arrays import Int64s, UInt64s
from hpctrain.data.order.epochs import Draw, MixedEpoch, Plan, plan_epoch
from hpctrain.data.order.order import Order, sample_keys, served_samples
from hpctrain.errors import ConfigError, DatasetError


@dataclass(frozen=True, slots=True)
class RankShare:
    """The part of all samples that one rank serves.

    Attributes:
        rank: of this process.
        world_size: number of ranks.
    """

    rank: int = 0
    world_size: int = 1

    def bounds(self, samples: int) -> tuple[int, int]:
        """Return the first sample of this rank and one past its last, of as many runs as ranks."""
        return (
            self.rank * samples // self.world_size,
            (self.rank + 1) * samples // self.world_size,
        )

    def example_row(self, samples: int) -> int:
        """Return a row to try things with, another one on each rank."""
        return self.bounds(samples)[0]

    def example_rows(self, samples: int, most: int) -> Int64s:
        """Return some rows to try things with: at most `most`, as many on every rank, ascending.

        Spread over the dataset, since neighbours are often alike.
        """
        count = min(most, samples)
        rows = (np.arange(count, dtype=np.int64) * samples + self.rank) // count % samples
        return np.unique(rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """How epochs are cut into batches, and those into passes.

    Attributes:
        global_batch_size: samples of all ranks in one batch.
        drop_last: leave out the last, smaller batch of an epoch. One that is resumed with another
            batch size ends where any epoch ends, if need be with a smaller batch.
        limit: end epochs after so many batches, as `served_samples` takes it.
        micro_batch_size: samples of a pass; None: any number.
        max_tokens: of samples of unequal length, values of a field in a pass; None: any number.
    """

    global_batch_size: int
    drop_last: bool = False
    limit: float | None = None
    micro_batch_size: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """Epochs that began in another order than new ones do, and end in it.

    Attributes:
        orders: by epoch.
        position: at which they go on.
    """

    orders: Mapping[int, Order] = field(default_factory=dict)
    position: int = 0


NONE_BEGUN = Begun()
"""Every epoch is a new one."""


class Epochs:
    """What a rank serves of every epoch, from the order alone.

    Attributes:
        batching: how epochs are cut.
        share: which part this rank serves.
        size: samples of all ranks that an epoch serves.
        largest_share: the most samples of any rank in any full batch.
        smallest_share: the fewest of any rank in any batch that begins where one ends.
        orders: that of new epochs, and those of epochs that were begun before.
    """

    def __init__(
        self,
        order: Order,
        source: str,
        batching: Batching,
        share: RankShare,
        *,
        begun: Begun = NONE_BEGUN,
        draw: Draw | None = None,
    ) -> None:
        """Check that every rank can take part.

        Args:
            order: of the epochs.
            source: what the user calls the dataset.
            batching: how they are cut.
            share: which part this rank serves.
            begun: epochs of another order.
            draw: what draws samples by weight, where the order is one of those.

        Raises:
            ConfigError: if there are more ranks than lanes.
            DatasetError: if the batch is larger than the dataset.
        """
        batch, world_size = batching.global_batch_size, share.world_size
        if batch > order.length:
            raise DatasetError(
                f"data.global_batch_size = {batch}, but an epoch of {source} has only "
                f"{order.length} samples: set it to at most {order.length}"
            )
        self.batching, self.share = batching, share
        self._order = order
        self._begun = dict(begun.orders)
        self._draw = draw
        order.require_world_size(world_size)
        for epoch, each in self._begun.items():
            if each.has_lanes and world_size > each.lanes:
                raise ConfigError(
                    f"epoch {epoch} was begun with {each.lanes} lanes and goes on with them, but "
                    f"there are {world_size} ranks: start at most {each.lanes} ranks until it ends"
                )
        self.orders = (order, *self._begun.values())
        self.size = served_samples(order.length, batch, batching.drop_last, batching.limit)
        self.largest_share = max(each.largest_share(batch, world_size) for each in self.orders)
        firsts = [(order, 0), *((each, begun.position) for each in self._begun.values())]
        self.smallest_share = min(
            each.smallest_share(batch, self.size, world_size, first) for each, first in firsts
        )
        self._planned: tuple[int, Plan] | None = None

    @property
    def batches(self) -> int:
        """Batches of an epoch."""
        return -(-self.size // self.batching.global_batch_size)

    def largest_share_of_group(self, batches: int) -> int:
        """Return the most samples of any rank in so many batches that follow each other."""
        batch, world_size = self.batching.global_batch_size, self.share.world_size
        return max(each.largest_share_of_group(batch, batches, world_size) for each in self.orders)

    def order_of(self, epoch: int) -> Order:
        """Return the order of an epoch; of a mixture, none before the one that the job began in."""
        if self._order.mixture is None:
            return self._begun.get(epoch, self._order)
        if not self._begun:
            self._begun[0] = self._order
        known = max((each for each in self._begun if each <= epoch), default=min(self._begun))
        for each in range(known, epoch):
            order = self._begun[each]
            self._begun[each + 1] = self._order.after(order, MixedEpoch(order, each).pattern)
        return self._begun[max(epoch, known)]

    def positions(self, epoch: int, start: int, stop: int) -> Int64s:
        """Return those of the positions start to stop - 1 that this rank serves."""
        return self.order_of(epoch).positions(start, stop, self.share.rank, self.share.world_size)

    def rows(self, epoch: int, start: int, stop: int) -> Int64s:
        """Return which rows of the dataset this rank serves of positions start to stop - 1."""
        return self._drawn_up(epoch).rows(self.positions(epoch, start, stop))

    def groups(self, epoch: int, start: int, batches: int) -> Iterator[tuple[list[int], Int64s]]:
        """Yield so many batches of an epoch at a time.

        Args:
            epoch: from 0.
            start: position of the first batch.
            batches: that are yielded together.

        Yields:
            The bounds of the batches, and the positions of this rank in them, ascending.
        """
        order, share, batch = self.order_of(epoch), self.share, self.batching.global_batch_size
        for bounds in _group_bounds(start, self.size, batch, batches):
            yield bounds, order.positions_of_group(bounds, share.rank, share.world_size)
        # What comes next is planned while the consumer is busy with the last of this epoch.
        self.plan(epoch + 1)

    def plan(self, epoch: int) -> Plan:
        """Return the order of an epoch drawn up: the one that was asked for last costs nothing."""
        if self._planned is None or self._planned[0] != epoch:
            self._planned = epoch, self._drawn_up(epoch)
        return self._planned[1]

    def _drawn_up(self, epoch: int) -> Plan:
        return plan_epoch(self.order_of(epoch), epoch, self._draw)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationShare:
    """What one rank is to serve of an evaluation, and in which batches.

    Attributes:
        batch_size: samples of one batch.
        ranks: which part this rank serves.
        seed: of the run: what transforms draw is the same in every evaluation.
        samples: evaluate with the first so many only; None: with all.
        rows: of the dataset, which this rank is to serve in this order; None: its share.
        max_tokens: of samples of unequal length, values of a field in a batch; None: any number.
            Not of `rows`.
    """

    batch_size: int
    ranks: RankShare
    seed: int = 0
    samples: int | None = None
    rows: Int64s | None = None
    max_tokens: int | None = None


class EvaluationPlan:
    """The batches of one rank in an evaluation, which serves every sample once over all ranks.

    Rank r serves the r-th of `world_size` runs of rows, in their order. Shares differ by at most
    one sample, so the numbers of batches may differ too.

    Attributes:
        samples: that all ranks together serve.
        first, stop: places of this rank: numbers of rows, or places in the rows that it was given.
        most_batches: of the rank with the most samples.
    """

    def __init__(
        self,
        share: EvaluationShare,
        samples: int,
        cut: Callable[[Int64s], list[tuple[int, int]]] | None = None,
    ) -> None:
        """Plan an evaluation.

        Args:
            share: what this rank is to serve.
            samples: of the dataset.
            cut: returns the batches that rows are cut into, as (first, stop), where their number
                is not that of all batches; None: it is.
        """
        self._share, self._of_dataset = share, samples
        self._batch_size = share.batch_size
        self.samples = samples if share.samples is None else share.samples
        self.first, self.stop = (
            share.ranks.bounds(self.samples) if share.rows is None else (0, len(share.rows))
        )
        largest_share = -(-self.samples // share.ranks.world_size)
        self.most_batches = -(-largest_share // share.batch_size)
        self._bounds: list[int] | None = None
        if cut is not None:
            self._cut(cut)

    def _cut(self, cut: Callable[[Int64s], list[tuple[int, int]]]) -> None:
        """Cut the share of every rank into batches of their own lengths."""
        assert self._share.rows is None
        ranks, counts = self._share.ranks, []
        for rank in range(ranks.world_size):
            first, stop = RankShare(rank, ranks.world_size).bounds(self.samples)
            rows = np.arange(first, stop, dtype=np.int64)
            cuts = cut(rows) if len(rows) else []
            counts.append(len(cuts))
            if rank == ranks.rank:
                self._bounds = [*(first + start for start, _ in cuts), stop]
        self.most_batches = max(counts)

    def __len__(self) -> int:
        if self._bounds is not None:
            return len(self._bounds) - 1
        return len(range(self.first, self.stop, self._batch_size))

    def groups(self, batches: int) -> Iterator[tuple[list[int], Int64s]]:
        """Yield so many batches of this rank at a time: their bounds, and the places in them."""
        for bounds in self._group_bounds(batches):
            yield bounds, np.arange(bounds[0], bounds[-1], dtype=np.int64)

    def rows(self, places: Int64s) -> Int64s:
        """Return which rows of the dataset are at these places."""
        rows = self._share.rows
        return places if rows is None else rows[places]

    def keys(self, rows: Int64s) -> UInt64s:
        """Return the keys that random transforms of rows draw from."""
        return sample_keys(self._share.seed, 0, rows)

    def example_rows(self, most: int) -> Int64s:
        """Return some rows to try things with: at most `most`, as many on every rank, ascending.

        Spread over this rank's share, since neighbours are often alike.
        """
        samples, given = self._of_dataset, self._share.rows
        first = self.first if given is None or not len(given) else int(given[0])
        count = min(most, self._batch_size, samples)
        apart = max(1, (self.stop - self.first) // count)
        return np.sort((first + apart * np.arange(count, dtype=np.int64)) % samples)

    def _group_bounds(self, batches: int) -> Iterator[list[int]]:
        if self._bounds is None:
            return _group_bounds(self.first, self.stop, self._batch_size, batches)
        bounds = self._bounds
        return (bounds[at : at + batches + 1] for at in range(0, len(bounds) - 1, batches))


def _group_bounds(start: int, stop: int, batch: int, batches: int) -> Iterator[list[int]]:
    """Cut start to stop into batches, and yield the bounds of so many batches at a time."""
    for first in range(start, stop, batch * batches):
        last = min(first + batch * batches, stop)
        yield [*range(first, last, batch), last]
