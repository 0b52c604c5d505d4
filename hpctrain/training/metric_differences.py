"""How much the metrics of some rows differ from those of the same rows in parts: pure."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpctrain.training.metrics import Part, quotient

TOLERANCE = 1e-3
"""Relative: above what sums in float32 lose, below what a cut changes."""

Difference = tuple[float, float]
"""A metric of the whole, and of the parts; of a tensor, its sum."""


def differing(
    whole: Part, parts: Sequence[Part], tolerance: float = TOLERANCE, floor: float = 0.0
) -> dict[str, Difference]:
    """Return what the parts add up to other than the whole. torchmetrics' own states are theirs.

    Args:
        whole: of some rows.
        parts: of the same rows.
        tolerance: relative.
        floor: differences below it are none: sums of numbers that cancel out have no more digits.
    """
    found: dict[str, Difference] = {}
    for name, value in whole.quotients.items():
        pair = quotient([value]), quotient([part.quotients[name] for part in parts])
        if _apart(torch.tensor(pair[0]), torch.tensor(pair[1]), tolerance, floor):
            found[name] = pair
    for name, expected in whole.sums.items():
        sums = [part.sums[name] for part in parts]
        same_shape = all(item.shape == expected.shape for item in sums)
        if not same_shape or _apart(expected, torch.stack(sums).sum(0), tolerance, floor):
            found[name] = _total([expected]), _total(sums)
    for name, expected in whole.rows.items():
        rows = [part.rows[name] for part in parts]
        if _apart(expected, torch.cat(rows), tolerance, floor):
            found[name] = _total([expected]), _total(rows)
    return found


def _total(tensors: Sequence[Tensor]) -> float:
    return sum(tensor.abs().double().sum().item() for tensor in tensors)


def _apart(one: Tensor, other: Tensor, tolerance: float, floor: float) -> bool:
    """Tell whether two differ, by more than a part of the largest; what is no number does not."""
    if one.shape != other.shape:
        return True
    if not one.is_complex():
        one, other = one.double(), other.double()
    finite = torch.isfinite(one) & torch.isfinite(other)
    one, other = one[finite], other[finite]
    if not one.numel():
        return False
    largest = torch.maximum(one.abs().max(), other.abs().max()).item()
    return bool((one - other).abs().max().item() > max(tolerance * largest, floor))


def remembered(first: Part, second: Part) -> dict[str, Difference]:
    """Return the sums that came out other the second time."""
    pairs = {
        name: pair
        for name in first.quotients
        for pair in zip(first.quotients[name], second.quotients[name], strict=True)
        if _apart(torch.tensor(pair[0]), torch.tensor(pair[1]), TOLERANCE, 0.0)
    }
    return pairs | differing(first, [second])
