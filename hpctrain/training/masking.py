"""Losses of which a mask takes a part only: missing values count for nothing."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from hpctrain.errors import TrainingError


def mask_of(fields: Mapping[str, Tensor], name: str | None, target: Tensor) -> Tensor | None:
    """Return the weight of every element of a target, of its shape; None: all weigh 1.

    Raises:
        TrainingError: if there is no such field, or it cannot be spread over the target.
    """
    if name is None:
        return None
    mask = fields.get(name)
    if mask is None:
        raise TrainingError(
            f'task.mask = "{name}": there is no such field; there are {", ".join(fields)}. '
            'Name one by data.fields.NAME.mask = "..."'
        )
    if mask.numel() == target.numel():
        return mask.reshape(target.shape)
    try:
        return mask.expand_as(target)
    except RuntimeError as error:
        raise TrainingError(
            f'task.mask = "{name}" is {tuple(mask.shape)}, and the target {tuple(target.shape)}: '
            "it needs a weight for each element of the target"
        ) from error


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Return the sum of values by their weights, ()."""
    return (values * mask.to(values.dtype)).sum()


def without_missing(target: Tensor, mask: Tensor) -> Tensor:
    """Return a target without what is missing in it: even a weight of 0 times NaN is NaN."""
    return target.where(mask != 0, 0)
