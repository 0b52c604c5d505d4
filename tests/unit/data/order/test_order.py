"""Every sample exactly once, in one order, whatever the number of ranks."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from hpctrain.data.order.epochs import Epoch, plan_epoch
from hpctrain.data.order.order import (
    Order,
    default_block_rows,
    default_lanes,
    lanes_of_rank,
    served_samples,
)
from hpctrain.errors import ConfigError

WORLD_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 12)
# (samples, lanes, window, block_rows): one block, short last blocks, fewer samples than lanes,
# fewer than a block, a multiple of everything, and one more.
ORDERS = [
    Order(samples=n, seed=11, lanes=lanes, window=window, block_rows=rows)
    for n, lanes, window, rows in [
        (1, 64, 4, 1),
        (1, 12, 4, 5),
        (5, 64, 4, 3),
        (63, 64, 1, 1),
        (64, 64, 4, 1),
        (65, 64, 2, 2),
        (97, 12, 3, 7),
        (768, 12, 4, 16),
        (769, 12, 4, 16),
        (1000, 13, 2, 9),
        (1000, 16, 8, 1000),
        (1437, 64, 4, 1),
        (1437, 64, 4, 5),
        (2048, 64, 4, 8),
    ]
]


def ids(order: Order) -> str:
    return f"{order.samples}-{order.lanes}-{order.window}-{order.block_rows}"


@pytest.mark.parametrize("order", ORDERS, ids=ids)
def test_an_epoch_is_a_permutation(order: Order) -> None:
    rows = Epoch(order, 3).rows(np.arange(order.samples))
    assert sorted(rows.tolist()) == list(range(order.samples))


@pytest.mark.parametrize("order", ORDERS, ids=ids)
def test_any_position_is_found_alone(order: Order) -> None:
    positions = np.arange(order.samples)
    rows = Epoch(order, 5).rows(positions)
    shuffled = np.random.default_rng(0).permutation(positions)[:40]
    assert Epoch(order, 5).rows(shuffled).tolist() == rows[shuffled].tolist()
    for position in shuffled[:5]:
        assert Epoch(order, 5).rows(np.array([position])) == rows[position]


@pytest.mark.parametrize("order", ORDERS, ids=ids)
def test_ranks_share_every_batch_and_miss_nothing(order: Order) -> None:
    for world_size, batch in itertools.product(WORLD_SIZES, (1, 7, 48, 64, 100)):
        if world_size > order.lanes or order.samples > 100 * batch:
            continue
        largest = 0
        for start in range(0, order.samples, batch):
            stop = min(start + batch, order.samples)
            parts = [order.positions(start, stop, r, world_size) for r in range(world_size)]
            shares = order.shares(start, stop, world_size)
            assert [len(part) for part in parts] == shares.tolist()
            assert all((np.diff(part) > 0).all() for part in parts)
            assert sorted(np.concatenate(parts).tolist()) == list(range(start, stop))
            largest = max(largest, int(shares.max()))
            if order.lanes % world_size == 0:
                assert shares.max() - shares.min() <= 1
        assert largest <= order.largest_share(batch, world_size)


def test_largest_share_is_reached() -> None:
    order = Order(samples=10**6, seed=0, lanes=64, window=4, block_rows=8)
    for world_size, batch in itertools.product((1, 2, 3, 5, 7, 12, 64), (1, 32, 48, 64, 100, 200)):
        starts = range(64 * 7)
        reached = max(int(order.shares(s, s + batch, world_size).max()) for s in starts)
        assert order.largest_share(batch, world_size) == reached


def test_restarts_and_other_sizes_in_mid_epoch_repeat_and_lose_nothing() -> None:
    draw = random.Random(5)
    for order in ORDERS:
        whole = Epoch(order, 2).rows(np.arange(order.samples)).tolist()
        seen: list[int] = []
        position = 0
        while position < order.samples:
            # A restart: nothing but the position is known, and all sizes are new.
            world_size = draw.choice([w for w in WORLD_SIZES if w <= order.lanes])
            batch = draw.choice([1, 3, 64, 65, 200])
            for _ in range(draw.randint(1, 4)):
                stop = min(position + batch, order.samples)
                parts = [order.positions(position, stop, r, world_size) for r in range(world_size)]
                batch_positions = np.sort(np.concatenate(parts))
                seen += Epoch(order, 2).rows(batch_positions).tolist()
                position = stop
        assert seen == whole


@pytest.mark.parametrize("order", ORDERS, ids=ids)
def test_windows_hold_what_they_serve(order: Order) -> None:
    """Walking the windows of a lane reads each of its rows once, in parts of whole blocks."""
    epoch = Epoch(order, 1)
    positions = np.arange(order.samples)
    rows = epoch.rows(positions)
    lanes = range(min(order.lanes, order.samples))
    for lane in lanes:
        expected = rows[positions % order.lanes == lane]
        served: list[int] = []
        while len(served) < len(expected):
            windows, runs = epoch.windows(np.array([lane]), np.array([len(served)]))
            assert windows.starts[0] == len(served)
            size = int(windows.stops[0]) - len(served)
            assert size <= order.longest_window_rows
            assert len(runs.rows) <= order.window
            held = np.full(size, -1)
            for row, count, place, owner in zip(*runs, strict=True):
                assert owner == 0
                assert row // order.block_rows == (row + count - 1) // order.block_rows
                held[place : place + count] = np.arange(row, row + count)
            served += held[windows.order[0, :size]].tolist()
        # One row a block is shuffled already: its windows are not shuffled again.
        if order.block_rows > 1:
            assert served == expected.tolist()
        else:
            assert sorted(served) == sorted(expected.tolist())


def test_order_never_changes() -> None:
    """A run resumed with a later version must find the order that it began in."""
    order = Order(samples=37, seed=1234, lanes=4, window=2, block_rows=3)
    rows = Epoch(order, 1).rows(np.arange(12)).tolist()
    assert rows == [36, 27, 17, 2, 32, 28, 16, 9, 31, 35, 15, 1]


@pytest.mark.parametrize("samples", [1, 5, 64, 1001])
def test_a_sequential_order_is_that_of_the_rows(samples: int) -> None:
    order = Order(samples=samples, seed=1, lanes=4, window=2, block_rows=1, sampling="sequential")
    for epoch in (0, 7):
        assert plan_epoch(order, epoch).rows(np.arange(samples)).tolist() == list(range(samples))
    order.require_world_size(12)  # it needs no lanes
    for world_size, batch in itertools.product(WORLD_SIZES, (1, 7, 64)):
        for begin in (0, samples // 2):  # from the start, and where another job has stopped
            bounds = [*range(begin, samples, batch), samples]
            groups = [order.positions_of_group(bounds, r, world_size) for r in range(world_size)]
            assert sorted(np.concatenate(groups).tolist()) == list(range(bounds[0], samples))
            for start, stop in itertools.pairwise(bounds):
                parts = [order.positions(start, stop, r, world_size) for r in range(world_size)]
                shares = order.shares(start, stop, world_size)
                # Neighbours are read in one go, and by one rank.
                assert np.concatenate(parts).tolist() == list(range(start, stop))
                assert [len(part) for part in parts] == shares.tolist()
                assert shares.max() - shares.min() <= 1
                assert shares.max() <= order.largest_share(batch, world_size)
                if stop - start == min(batch, samples):
                    assert shares.min() >= order.smallest_share(batch, samples, world_size)
            most = order.largest_share_of_group(batch, len(bounds) - 1, world_size)
            assert max(len(part) for part in groups) <= most


def test_seed_and_epoch_change_the_order() -> None:
    positions = np.arange(500)
    order = Order(samples=500, seed=1, lanes=8, window=4, block_rows=4)
    other = Order(samples=500, seed=2, lanes=8, window=4, block_rows=4)
    orders = [Epoch(order, 0), Epoch(order, 1), Epoch(other, 0)]
    assert len({tuple(epoch.rows(positions).tolist()) for epoch in orders}) == 3


def test_blocks_are_mixed_over_batches() -> None:
    """On data sorted by label, the mean label of batches spreads no more than for random ones."""
    order = Order(samples=100_000, seed=1, lanes=64, window=4, block_rows=32)
    labels = Epoch(order, 0).rows(np.arange(order.samples)) / order.samples
    means = labels[: 128 * 781].reshape(-1, 128).mean(axis=1)
    assert means.std() < 1.2 * np.sqrt(1 / 12 / 128)


def test_no_array_of_all_samples() -> None:
    """10**12 samples in 10**5 blocks: numbers beyond 32 bits, memory for blocks only."""
    order = Order(samples=10**12 + 1, seed=1, lanes=4096, window=4, block_rows=10**7)
    epoch = Epoch(order, 0)
    # The last block holds a single row, and every lane starts somewhere in a block.
    positions = np.array([0, 1, 10**11 + 7, 10**12 - 1, 10**12])
    lane_rows, lanes = np.divmod(positions, order.lanes)
    rows = epoch.unshuffled_rows(lanes, lane_rows)
    assert len(set(rows.tolist())) == len(rows)
    assert ((rows >= 0) & (rows < order.samples)).all()
    assert order.positions(10**12 - 5, 10**12 + 1, 3, 1000).size <= 6
    assert order.shares(0, order.samples, 1000).sum() == order.samples


@pytest.mark.parametrize(
    ("batch", "lanes"),
    [
        (1, 64),
        (64, 64),
        (65, 128),
        (100, 128),
        (128, 128),
        (4096, 4096),
        (4097, 4096),
        (10**6, 4096),
    ],
)
def test_default_lanes(batch: int, lanes: int) -> None:
    assert default_lanes(batch) == lanes


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        ((1437, 264, 64, 4), 1),  # small data: a full shuffle
        ((60_000, 784, 64, 4), 58),
        ((10**7, 12_296, 64, 4), 42),  # the budget binds
        ((10**7, 2050, 64, 4), 255),
        ((10**5, 56 * 2**20, 64, 4), 1),  # a row is larger than the budget of a window
        ((10**7, 12_296, 64, 4, 16), 32),  # whole chunks
        ((10**7, 12_296, 64, 4, 100), 42),  # a chunk is larger than a block
        ((60_000, 784, 64, 4, 100), 100),  # a little larger: better whole
        ((60_000, 784, 64, 4, 120), 58),  # too few blocks would be left
        ((3, 4, 64, 4), 1),
    ],
)
def test_default_block_rows(arguments: tuple[int, ...], rows: int) -> None:
    assert default_block_rows(*arguments) == rows


def test_lanes_of_ranks_are_dealt_evenly() -> None:
    for lanes, world_size in itertools.product((64, 13, 100), range(1, 14)):
        parts = [lanes_of_rank(rank, world_size, lanes) for rank in range(world_size)]
        assert sorted(itertools.chain(*parts)) == list(range(lanes))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("samples", "batch", "drop_last", "limit", "served"),
    [
        (100, 64, False, None, 100),
        (100, 64, True, None, 64),
        (128, 64, True, None, 128),
        (10, 64, True, None, 0),
        (100, 64, False, 1, 64),
        (100, 64, False, 1.0, 100),
        (100, 64, True, 2, 64),
        (100, 10, False, 0.25, 20),
        (100, 10, False, 0.01, 10),  # a part of few batches is one at least
        (100, 10, False, 99, 100),
    ],
)
def test_served_samples(
    samples: int, batch: int, drop_last: bool, limit: float | None, served: int
) -> None:
    assert served_samples(samples, batch, drop_last, limit) == served


def test_more_ranks_than_lanes_is_refused_with_the_number_to_set() -> None:
    order = Order(samples=1000, seed=1, lanes=16, window=4, block_rows=1)
    order.require_world_size(16)
    with pytest.raises(ConfigError, match=r"data\.lanes = 16, but there are 100 ranks.* to 128"):
        order.require_world_size(100)
