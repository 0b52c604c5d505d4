"""Regression: numbers compared with numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hpctrain.training.task.losses import LossReduction, load_elementwise_loss, load_loss
from hpctrain.training.task.task import (
    Direction,
    Fields,
    Supervised,
    mask_of,
    masked_sum,
    weight_of,
    without_missing,
)

SQUARED = "squared"
"""Of weighted squared errors and what they are divided by: sums, from which `finish` has rmse."""


def _mean_sum(losses: Tensor, weights: Tensor) -> Tensor:
    """Return the sum over samples of the weighted mean over the elements of each."""
    return masked_sum(losses, weights) * (len(losses) / max(1, losses.numel()))


class Regression(Supervised):
    """Numbers: the mean over samples of the mean over the elements of each."""

    name = "regression"
    metrics: Mapping[str, Direction] = {"loss": "min", "mae": "min", "mse": "min"}

    def __init__(
        self,
        inputs: Sequence[str],
        target: str | None,
        *,
        mask: str | None = None,
        weight: str | None = None,
        loss: str = "mse",
        loss_reduction: LossReduction | None = None,
        loss_arguments: Mapping[str, Any] | None = None,
        batch_dependent_loss: bool = False,
    ) -> None:
        """Check the arguments and find the loss.

        Args:
            inputs: fields that the model receives, in the order of its arguments.
            target: field of the shape of the model's output, float.
            mask: field of weights of its elements, 0 where they are missing; then the loss is the
                mean over the elements that are there, of all samples. None: all count.
            weight: field of how much the elements of a sample count, 1 on average, such as
                "t2m.weight" of `weight = "cos_latitude"` in [data.fields.t2m]; by it loss and
                metrics are weighted, and "rmse" is one of them. None: all the same.
            loss: "mse" and "mae" are means over the elements of a sample; or the import path of
                your own, "package.module:Name": a class, an object or a function of
                (output, target).
            loss_reduction: what your own loss returns for a batch: "sum" over its samples, or
                their mean, "per-sample-mean". Not needed where it takes `reduction` itself.
            loss_arguments: keyword arguments of your own loss.
            batch_dependent_loss: whether in your own loss that of a sample depends on the others
                in its pass, and is meant to.

        Raises:
            ConfigError: if the loss cannot be found, or its sum over samples cannot be had.
        """
        super().__init__(inputs, target, mask)
        self.counts_samples = mask is None
        self.batch_dependent_loss = batch_dependent_loss
        self.weight = weight
        if weight is not None:
            self.metrics = {**type(self).metrics, "rmse": "min"}
        if mask is not None or weight is not None:
            self._losses = load_elementwise_loss(loss, loss_arguments or {})
        else:
            self._loss = load_loss(loss, loss_reduction, loss_arguments or {})

    def loss(self, model: nn.Module, fields: Fields) -> tuple[Tensor, Tensor | int]:
        """Return the summed loss and the number of samples."""
        output, target = self._compare(model, fields)
        if self.mask is not None:
            mask = mask_of(fields, self.mask, target)
            losses = self._losses(output, without_missing(target, mask))
            if self.weight is not None:
                mask = mask * weight_of(fields, self.weight, target)
            return masked_sum(losses, mask), mask.sum()
        if self.weight is not None:
            weight = weight_of(fields, self.weight, target)
            return _mean_sum(self._losses(output, target), weight), target.shape[0]
        return self._loss(output, target), target.shape[0]

    def evaluate(self, model: nn.Module, fields: Fields) -> dict[str, tuple[Tensor, Tensor | int]]:
        """Return sums of the loss, and of absolute and squared errors."""
        output, target = self._compare(model, fields)
        output, target = output.double(), target.double()
        if self.mask is not None or self.weight is not None:
            return self._evaluate_weighted(output, target, fields)
        samples = target.shape[0]
        elements = max(1, target.numel() // samples)
        errors = output - target
        return {
            "loss": (self._loss(output, target), samples),
            "mae": (errors.abs().sum() / elements, samples),
            "mse": (errors.square().sum() / elements, samples),
        }

    def finish(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the root of the mean squared error, where there are weights."""
        if SQUARED not in sums:
            return {}
        total, count = sums[SQUARED].tolist()
        return {"rmse": math.sqrt(total / count) if count else math.nan}

    def _evaluate_weighted(self, output: Tensor, target: Tensor, fields: Fields) -> dict[str, Any]:
        """Return the sums of `evaluate` by mask and weight."""
        weights = torch.ones((), dtype=target.dtype, device=target.device).expand_as(target)
        count: Tensor | int = target.shape[0]
        if self.weight is not None:
            weights = weight_of(fields, self.weight, target).to(target.dtype).expand_as(target)
        if self.mask is not None:
            mask = mask_of(fields, self.mask, target)
            target, weights = without_missing(target, mask), mask.to(target.dtype) * weights
            count = weights.sum()
        errors = output - target
        each = {"loss": self._losses(output, target), "mae": errors.abs(), "mse": errors.square()}
        sums: dict[str, Any] = {
            name: (
                _mean_sum(values, weights) if self.mask is None else masked_sum(values, weights),
                count,
            )
            for name, values in each.items()
        }
        if self.weight is not None:
            total, counted = sums["mse"]
            sums[SQUARED] = torch.stack([total, torch.as_tensor(counted).to(total)])
        return sums

    def _fitted(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if output.shape != target.shape:
            # Broadcasting (samples, 1) against (samples,) would compare all with all.
            if output.shape == (*target.shape, 1):
                output = output.squeeze(-1)
            elif target.shape == (*output.shape, 1):
                target = target.squeeze(-1)
            else:
                raise self._misfit(
                    output,
                    target,
                    "an output of the shape of its target",
                    "name another field by task.target, change what the model returns by [model], "
                    "or move axes by data.transform",
                )
        return output, target.to(output.dtype)


def in_unit(values: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return predictions of a target that is normalized in the unit of its files.

    Args:
        values: (samples, *shape), floats of at least 32 bits.
        mean: one number, or one a channel: the first axis of a sample.
        std: the same.
    """
    ones = [1] * max(0, values.ndim - 2)
    center, scale = (
        torch.tensor(numbers, dtype=values.dtype, device=values.device).view(-1, *ones)
        for numbers in (mean, std)
    )
    return values * scale + center
