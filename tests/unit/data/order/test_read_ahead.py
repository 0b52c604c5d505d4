"""Windows of lanes: every row arrives in time, once, at the place that the order gives it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpctrain.data.order import read_ahead
from hpctrain.data.order.epochs import Epoch
from hpctrain.data.order.order import Order
from hpctrain.data.order.read_ahead import LaneWindows, RowStream

ORDERS = st.builds(
    Order,
    samples=st.integers(1, 700),
    seed=st.integers(0, 9),
    lanes=st.integers(1, 20),
    window=st.integers(1, 5),
    block_rows=st.integers(2, 9),
)


CUTS = st.lists(st.integers(1, 150), min_size=1, max_size=4)


@pytest.fixture(autouse=True)
def few_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "MOST_ROWS", 60)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=ORDERS, epoch=st.integers(0, 3), cuts=CUTS, data=st.data())
def test_rows_arrive_before_they_are_served(
    order: Order, epoch: int, cuts: list[int], data: st.DataObject
) -> None:
    world_size = data.draw(st.integers(1, order.lanes))
    rank = data.draw(st.integers(0, world_size - 1))
    start = data.draw(st.integers(0, order.samples - 1))
    stop = data.draw(st.integers(start + 1, order.samples))
    plan = Epoch(order, epoch)
    expected = plan.rows(order.positions(start, stop, rank, world_size))
    windows = LaneWindows(plan, rank, world_size, start, stop)
    arrived = np.full(len(expected), -1)
    lengths = itertools.cycle(cuts)
    position = start
    while position < stop:
        position = min(stop, position + next(lengths))
        for rows, counts, places in windows.until(position):
            first = 0
            for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
                own = places[first : first + count]
                assert (arrived[own[own >= 0]] == -1).all()
                arrived[own[own >= 0]] = (row + np.arange(count))[own >= 0]
                first += count
            assert first == len(places) <= max(60, order.longest_window_rows)
        served = len(order.positions(start, position, rank, world_size))
        assert (arrived[:served] == expected[:served]).all()
        ahead = order.positions(start, stop, rank, world_size)[np.flatnonzero(arrived >= 0)]
        assert ahead.max(initial=0) < position + order.lanes * order.longest_window_rows
    assert (arrived == expected).all()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=ORDERS, cuts=CUTS)
def test_rows_are_those_of_the_epoch(order: Order, cuts: list[int]) -> None:
    plan = Epoch(order, 0)
    stream = RowStream(LaneWindows(plan, 0, 1, 0, order.samples))
    positions, lengths = np.arange(order.samples, dtype=np.int64), itertools.cycle(cuts)
    while len(positions):
        part, positions = np.split(positions, [next(lengths)])
        assert (stream.next(part) == plan.rows(part)).all()
