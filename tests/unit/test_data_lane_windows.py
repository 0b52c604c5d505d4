"""Windows of lanes in slots: every position is found, wherever calls are cut."""

from __future__ import annotations

import numpy as np
from hypothesis import given
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


@given(order=ORDERS, epoch=st.integers(0, 3), data=st.data())
def test_the_slots_hold_what_the_positions_ask_for(
    order: Order, epoch: int, data: st.DataObject
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
    while len(positions):
        ahead = positions[: data.draw(st.integers(1, 100))]
        runs, count = windows.advance(ahead)
        assert count > 0
        if runs is not None:
            for row, rows, place, slot in zip(*(each.tolist() for each in runs), strict=True):
                slots[slot, place : place + rows] = np.arange(row, row + rows)
        found, places = windows.find(ahead[:count])
        assert (slots[found, places] == plan.rows(ahead[:count])).all()
        positions = positions[count:]


@given(order=ORDERS, data=st.data())
def test_rows_are_those_of_the_epoch_however_calls_are_cut(
    order: Order, data: st.DataObject
) -> None:
    plan = Epoch(order, 0)
    windows = LaneWindows(plan, 0, 1)
    done = 0
    while done < order.samples:
        stop = min(order.samples, done + data.draw(st.integers(1, 200)))
        positions = np.arange(done, stop, dtype=np.int64)
        assert (windows.rows_at(positions) == plan.rows(positions)).all()
        done = stop
