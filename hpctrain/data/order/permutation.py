"""Permutations that are the same on every machine and with every version of numpy.

numpy's own generators may change what they draw between versions; an order of the data that is
resumed after an upgrade may not. So a permutation is the sorting order of a hash of the items.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hpctrain.data.arrays import Int64s, UInt64s

# Source: the increment and the multipliers of splitmix64 (Steele, Lea, Flood 2014).
INCREMENT = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SHIFTS = (30, 27, 31)

LEAST_PACKED = 32
"""Shorter rows are ranked as fast as they are sorted."""


def derive_key(*parts: int) -> int:
    """Return a 64-bit key of some integers, such as (seed, epoch); their order matters.

    Args:
        *parts: each 0 to 2**64 - 1.
    """
    return int(derive_keys(0, *(np.array([part], np.uint64) for part in parts))[0])


def derive_keys(key: int, *parts: npt.NDArray[Any]) -> UInt64s:
    """Return the keys of many tuples of integers at once, all below one key.

    Args:
        key: of what they have in common.
        *parts: (count,) integers, at least 0.

    Returns:
        (count,) uint64.
    """
    keys = np.full(len(parts[0]), key, np.uint64)
    for part in parts:
        keys += np.uint64(INCREMENT)
        keys ^= part.astype(np.uint64)
        _mix(keys)
    return keys


def hash_items(keys: UInt64s, count: int) -> UInt64s:
    """Return the hashes of the items 0 to count - 1 under each key.

    Under one key no two items have the same hash: the increment is odd and the mixing is a
    bijection of the 64-bit integers.

    Returns:
        (keys, count) uint64.
    """
    items = np.arange(1, count + 1, dtype=np.uint64)
    hashes: UInt64s = items * np.uint64(INCREMENT) + keys[:, None]
    _mix(hashes)
    return hashes


def permutation(key: int, count: int) -> Int64s:
    """Return the items 0 to count - 1 in a random order that the key alone decides.

    Returns:
        (count,) int64.
    """
    return permutations(np.array([key], np.uint64), np.array([count], np.int64)).ravel()


def permutations(keys: UInt64s, counts: Int64s) -> Int64s:
    """Return a permutation for each key, in a row that begins with its items 0 to count - 1.

    Hashes of one key never tie, so every correct sort gives this same order; a stable one is
    asked for so that what lies beyond `counts`, all with the highest hash, stays behind.

    Args:
        keys: (permutations,) uint64.
        counts: (permutations,) int64.

    Returns:
        (permutations, longest count) int64; what is beyond a row's own count means nothing.
    """
    longest = int(counts.max())
    hashes = hash_items(keys, longest)
    if (counts != longest).any():
        hashes[np.arange(longest) >= counts[:, None]] = np.uint64(2**64 - 1)
    return order_of(hashes)


def order_of(hashes: UInt64s) -> Int64s:
    """Return what sorts each row; of equal hashes, the item that comes first is first.

    Numbers are sorted many times faster than they are ranked. So long rows are sorted with the
    number of each item in place of its lowest bits; where the others tell too few apart, which is
    rare, the slow way decides.
    """
    count = hashes.shape[1]
    if count >= LEAST_PACKED:
        bits = np.uint64((count - 1).bit_length())
        packed = (hashes >> bits << bits) | np.arange(count, dtype=np.uint64)
        packed.sort(axis=1)
        upper = packed >> bits
        if (upper[:, 1:] != upper[:, :-1]).all():
            items: UInt64s = packed & ((np.uint64(1) << bits) - np.uint64(1))
            return items.astype(np.int64)
    return np.argsort(hashes, axis=1, kind="stable").astype(np.int64, copy=False)


def _mix(values: UInt64s) -> None:
    """Replace 64-bit integers by their hashes. Arrays wrap silently where scalars would warn."""
    values ^= values >> np.uint64(SHIFTS[0])
    values *= np.uint64(MULTIPLIERS[0])
    values ^= values >> np.uint64(SHIFTS[1])
    values *= np.uint64(MULTIPLIERS[1])
    values ^= values >> np.uint64(SHIFTS[2])
