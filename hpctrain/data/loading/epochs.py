"""The epochs of a run: which positions of them a rank serves, and which samples these are."""

from __future__ import annotations

from collections.abc import Mapping

from hpctrain.data.mixed_epoch import MixedEpoch
from hpctrain.data.order import Draw, Order, Plan, plan_epoch, served_samples
from hpctrain.data.permutation import Int64s
from hpctrain.errors import ConfigError, DatasetError


class Epochs:
    """What a rank serves of every epoch, from the order alone.

    Attributes:
        batch: samples of all ranks in one batch.
        size: samples of all ranks that an epoch serves.
        largest_share: the most samples of any rank in any full batch.
        smallest_share: the fewest of any rank in any batch that begins where one ends.
        orders: that of new epochs, and those of epochs that were begun before.
    """

    def __init__(
        self,
        order: Order,
        source: str,
        *,
        global_batch_size: int,
        drop_last: bool,
        rank: int,
        world_size: int,
        begun: Mapping[int, Order] | None = None,
        draw: Draw | None = None,
        limit: float | None = None,
        begin: int = 0,
    ) -> None:
        """Check that every rank can take part.

        Args:
            order: of the epochs.
            source: what the user calls the dataset.
            global_batch_size: samples of all ranks in one batch.
            drop_last: leave out the last, smaller batch of an epoch.
            rank: of this process.
            world_size: number of ranks.
            begun: epochs that began in another order than `order`, and end in it.
            draw: what draws samples by weight, where the order is one of those.
            limit: end epochs after so many batches, as `served_samples` takes it.
            begin: position at which epochs of `begun` go on.

        Raises:
            ConfigError: if there are more ranks than lanes.
            DatasetError: if the batch is larger than the dataset.
        """
        if global_batch_size > order.length:
            raise DatasetError(
                f"data.global_batch_size = {global_batch_size}, but an epoch of {source} has only "
                f"{order.length} samples: set it to at most {order.length}"
            )
        self._order = order
        self._begun = dict(begun or {})
        self._draw = draw
        order.require_world_size(world_size)
        for epoch, each in self._begun.items():
            if each.has_lanes and world_size > each.lanes:
                raise ConfigError(
                    f"epoch {epoch} was begun with {each.lanes} lanes and goes on with them, but "
                    f"there are {world_size} ranks: start at most {each.lanes} ranks until it ends"
                )
        self.batch = global_batch_size
        self._rank = rank
        self._world_size = world_size
        self.orders = (order, *self._begun.values())
        self.size = served_samples(order.length, global_batch_size, drop_last, limit)
        self.largest_share = max(
            each.largest_share(global_batch_size, world_size) for each in self.orders
        )
        self.smallest_share = min(
            each.smallest_share(global_batch_size, self.size, world_size, first)
            for each, first in [(order, 0), *((each, begin) for each in self._begun.values())]
        )
        self._planned: tuple[int, Plan] | None = None

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
        return self.order_of(epoch).positions(start, stop, self._rank, self._world_size)

    def rows(self, epoch: int, start: int, stop: int) -> Int64s:
        """Return which rows of the dataset this rank serves of positions start to stop - 1."""
        return self._drawn_up(epoch).rows(self.positions(epoch, start, stop))

    def plan(self, epoch: int) -> Plan:
        """Return the order of an epoch drawn up: the one that was asked for last costs nothing."""
        if self._planned is None or self._planned[0] != epoch:
            self._planned = epoch, self._drawn_up(epoch)
        return self._planned[1]

    def _drawn_up(self, epoch: int) -> Plan:
        order = self.order_of(epoch)
        if order.mixture is not None:
            return MixedEpoch(order, epoch)
        return plan_epoch(order, epoch, self._draw)
