"""Permutations: complete, keyed, and the same for ever."""

from __future__ import annotations

import numpy as np
import pytest

from hpctrain.data.order.permutation import (
    derive_key,
    derive_keys,
    hash_items,
    order_of,
    permutation,
    permutations,
)

MASK = 2**64 - 1


def splitmix64(state: int) -> int:
    """One output of splitmix64, in plain integers."""
    state = (state + 0x9E3779B97F4A7C15) & MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def test_hash_is_splitmix64() -> None:
    assert hash_items(np.array([0], np.uint64), 1)[0, 0] == 0xE220A8397B1DCDAF
    key = 2**64 - 12345
    expected = [splitmix64((key + i * 0x9E3779B97F4A7C15) & MASK) for i in range(50)]
    assert hash_items(np.array([key], np.uint64), 50)[0].tolist() == expected


def test_order_never_changes() -> None:
    """A run resumed with a later version must find the order that it began in."""
    assert derive_key(1234, 0, 1) == 0x4CDDCD389B568030
    assert permutation(derive_key(1234, 0), 12).tolist() == [10, 4, 6, 7, 2, 1, 11, 5, 3, 0, 9, 8]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 1000, 4097])
def test_permutation_is_complete(count: int) -> None:
    assert sorted(permutation(7, count).tolist()) == list(range(count))


def test_keys_differ_by_every_part_and_by_order() -> None:
    parts = [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1), (0, 0, 0), (MASK,), (2**63,)]
    assert len({derive_key(*each) for each in parts}) == len(parts)


def test_many_keys_at_once_are_those_of_one_at_a_time() -> None:
    lanes, windows = np.arange(5), np.array([3, 1, 4, 1, 5])
    keys = derive_keys(derive_key(1, 2), lanes, windows)
    expected = [derive_key(1, 2, lane, int(windows[lane])) for lane in range(5)]
    assert keys.tolist() == expected


def test_many_permutations_at_once_are_those_of_one_at_a_time() -> None:
    keys = np.array([5, 6, 7], np.uint64)
    counts = np.array([10, 3, 7])
    rows = permutations(keys, counts)
    for row, key, count in zip(rows, keys.tolist(), counts.tolist(), strict=True):
        assert row[:count].tolist() == permutation(key, count).tolist()


@pytest.mark.parametrize("count", [2, 31, 32, 33, 64, 1000])
@pytest.mark.parametrize("different", [3, 2**20, 2**64 - 1])
def test_sorting_is_that_of_the_whole_hash(count: int, different: int) -> None:
    """Also where hashes differ in their lowest bits only, or not at all."""
    draw = np.random.default_rng(count)
    for shift in (0, 40):
        hashes = draw.integers(0, different, (5, count), np.uint64) << np.uint64(shift)
        expected = np.argsort(hashes, axis=1, kind="stable")
        assert (order_of(hashes) == expected).all()


def test_permutations_look_random() -> None:
    """Every item is at every place about equally often (chi squared, 81 degrees of freedom)."""
    size, draws = 10, 4000
    table = np.zeros((size, size))
    for epoch in range(draws):
        table[np.arange(size), permutation(derive_key(9, epoch), size)] += 1
    expected = draws / size
    assert ((table - expected) ** 2 / expected).sum() < 140
