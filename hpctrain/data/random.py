"""Random numbers that belong to samples: a hash of each sample's key and a counter.

For transforms (`data.transform`): what is drawn for a sample does not depend on which others are
in its batch, hence not on the number of ranks, and needs no generator whose state could be lost.

    from hpctrain.data import random

    def augment(fields, keys, *, training):
        if training:
            flip = random.uniform(keys) < 0.5
            fields["image"][flip] = fields["image"][flip].flip(-1)
        return fields
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hpctrain.data.order.permutation import INCREMENT, MULTIPLIERS, SHIFTS

_FRACTION_BITS = 53


def uniform(keys: Tensor, *shape: int, stream: int = 0) -> Tensor:
    """Draw from 0 inclusive to 1 exclusive.

    Args:
        keys: (samples,) uint64, as a transform receives them.
        *shape: of what is drawn for each sample.
        stream: another one gives other numbers of the same keys.

    Returns:
        (samples, *shape) float64.
    """
    high = _shifted(hashes(keys, *shape, stream=stream), 64 - _FRACTION_BITS)
    return high.double() * 2.0**-_FRACTION_BITS


def integers(keys: Tensor, low: int, high: int, *shape: int, stream: int = 0) -> Tensor:
    """Draw whole numbers from `low` inclusive to `high` exclusive, (samples, *shape) int64."""
    drawn = uniform(keys, *shape, stream=stream) * (high - low)
    # A product may round up to the end of the range.
    return (low + drawn.long()).clamp_(max=high - 1)


def normal(keys: Tensor, *shape: int, stream: int = 0) -> Tensor:
    """Draw with mean 0 and variance 1, (samples, *shape) float64.

    Source: Box and Muller (1958).
    """
    pairs = uniform(keys, 2, *shape, stream=stream)
    radius = torch.sqrt(-2.0 * torch.log1p(-pairs[:, 0]))
    return radius * torch.cos(2.0 * math.pi * pairs[:, 1])


def hashes(keys: Tensor, *shape: int, stream: int = 0) -> Tensor:
    """Return 64 random bits for each number to draw, (samples, *shape) int64.

    torch has no arithmetic of uint64; that of int64 wraps to the same bits.
    """
    start = _mixed(keys.view(torch.int64) + _signed(INCREMENT) ^ stream)
    items = torch.arange(1, 1 + math.prod(shape), dtype=torch.int64, device=keys.device)
    counters = start[:, None] + items * _signed(INCREMENT)
    return _mixed(counters).view(len(keys), *shape)


def _mixed(values: Tensor) -> Tensor:
    """Return the hashes of 64-bit integers, as `permutation` makes them."""
    first, second, last = SHIFTS
    values = (values ^ _shifted(values, first)) * _signed(MULTIPLIERS[0])
    values = (values ^ _shifted(values, second)) * _signed(MULTIPLIERS[1])
    return values ^ _shifted(values, last)


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros, where int64 would fill with its sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    """Return the integer from -2^63 whose bits are those of one to 2^64."""
    return number - 2**64 if number >= 2**63 else number
