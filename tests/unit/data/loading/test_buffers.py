"""Memory for reading ahead: what is planned is what is taken."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.lib.array_utils import byte_bounds

from hpctrain.data.dataset import Field
from hpctrain.data.loading.prefetch import (
    ALIGNMENT_BYTES,
    MOST_PADDED,
    BufferPool,
    MemoryPlan,
    new_bytes,
)


class Counting:
    """Allocates, and adds up."""

    def __init__(self) -> None:
        self.total = 0

    def __call__(self, size: int) -> np.ndarray:
        self.total += size
        return new_bytes(size)


@pytest.mark.parametrize("shape", [(), (3, 64, 64), (1025,), (3, 513, 513), (101,), (64,)])
@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
def test_no_more_than_groups_need(shape: tuple[int, ...], rows: int) -> None:
    field = Field(shape, np.dtype("u1"))
    count = Counting()
    pool = BufferPool({"x": field}, rows, 5, count)
    taken = [pool.take(rows)["x"] for _ in range(5)]
    assert count.total <= 5 * rows * field.row_bytes * MOST_PADDED
    for each in taken:
        assert each.shape == (rows, field.row_bytes)
        assert each.ctypes.data % ALIGNMENT_BYTES == 0
        each[0] = each[-1] = 1  # it is there, to its last byte
    # By their addresses: to fill 4 GB would take 12 s.
    ends = sorted(byte_bounds(each) for each in taken)
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(ends))


def test_memory_comes_back() -> None:
    count = Counting()
    pool = BufferPool({"x": Field((64,), np.dtype("u1"))}, 10, 2, count)
    kept = pool.take(10)["x"]
    for _ in range(5):
        pool.take(3)
    assert count.total == 2 * 10 * 64
    more = [pool.take(10), pool.take(10)]  # one more than there is room for
    assert count.total == 3 * 10 * 64
    assert kept.shape == (10, 64)
    del more
    assert pool.take(10)["x"].shape == (10, 64)
    assert count.total == 3 * 10 * 64


@pytest.mark.parametrize("batches", [1, 2, 5, 1000])
@pytest.mark.parametrize("ahead", [0, 3, 100])
@pytest.mark.parametrize("share", [1000, 10**6, 10**8])
def test_a_plan_keeps_its_budget(batches: int, ahead: int, share: int) -> None:
    plan = MemoryPlan.make(share, 512.0, batches=batches, ahead=ahead, ahead_share=share)
    assert plan.total <= 512e6
    assert 1 <= plan.group_batches <= batches
    assert plan.windows_fit == ((ahead + 4) * share <= 512e6)
    # No more than an epoch, and the end of the one before.
    assert plan.groups_ready <= -(-batches // plan.group_batches) + 1
