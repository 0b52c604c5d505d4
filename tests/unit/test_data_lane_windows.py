"""Windows of lanes in slots: every position is found, wherever calls are cut."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.data.order.lane_windows import LaneWindows, count_slots
from hpctrain.data.order.partition import Order, lanes_of_rank
from hpctrain.data.order.shuffle import Epoch

ORDERS = st.builds(
    Order,
    samples=st.integers(1, 700),
    seed=st.integers(0, 9),
    lanes=st.integers(1, 20),
    window=st.integers(1, 5),
    block_rows=st.integers(2, 9),
)


CUTS = st.lists(st.integers(1, 150), min_size=1, max_size=4)


@settings(deadline=None)
@given(order=ORDERS, epoch=st.integers(0, 3), cuts=CUTS, data=st.data())
def test_the_slots_hold_what_the_positions_ask_for(
    order: Order, epoch: int, cuts: list[int], data: st.DataObject
) -> None:
    world_size = data.draw(st.integers(1, order.lanes))
    rank = data.draw(st.integers(0, world_size - 1))
    start = data.draw(st.integers(0, order.samples - 1))
    plan = Epoch(order, epoch)
    windows = LaneWindows(plan, rank, world_size)
    slots = np.full(
        (count_slots(len(lanes_of_rank(rank, world_size, order.lanes))), order.longest_window_rows),
        -1,
    )
    positions = order.positions(start, order.samples, rank, world_size)
    lengths = itertools.cycle(cuts)
    while len(positions):
        ahead = positions[: next(lengths)]
        runs, count = windows.advance(ahead)
        assert count > 0
        if runs is not None:
            for row, rows, place, slot in zip(*(each.tolist() for each in runs), strict=True):
                slots[slot, place : place + rows] = np.arange(row, row + rows)
        found, places = windows.find(ahead[:count])
        assert (slots[found, places] == plan.rows(ahead[:count])).all()
        positions = positions[count:]


@settings(deadline=None)
@given(order=ORDERS, cuts=CUTS)
def test_rows_are_those_of_the_epoch(order: Order, cuts: list[int]) -> None:
    plan = Epoch(order, 0)
    windows = LaneWindows(plan, 0, 1)
    positions, lengths = np.arange(order.samples, dtype=np.int64), itertools.cycle(cuts)
    while len(positions):
        part, positions = np.split(positions, [next(lengths)])
        assert (windows.rows_at(part) == plan.rows(part)).all()
