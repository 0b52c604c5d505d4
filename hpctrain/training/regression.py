"""Regression: numbers compared with numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hpctrain.training.losses import LossReduction, load_elementwise_loss, load_loss
from hpctrain.training.task import (
    Direction,
    Fields,
    Supervised,
    mask_of,
    masked_sum,
    without_missing,
)


class Regression(Supervised):
    """Numbers: the mean over samples of the mean over the elements of each."""

    name = "regression"
    metrics: ClassVar[Mapping[str, Direction]] = {"loss": "min", "mae": "min", "mse": "min"}

    def __init__(
        self,
        inputs: Sequence[str],
        target: str | None,
        *,
        mask: str | None = None,
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
        if mask is not None:
            self._losses = load_elementwise_loss(loss, loss_arguments or {})
        else:
            self._loss = load_loss(loss, loss_reduction, loss_arguments or {})

    def loss(self, model: nn.Module, fields: Fields) -> tuple[Tensor, Tensor | int]:
        """Return the summed loss and the number of samples."""
        output, target = self._compare(model, fields)
        if self.mask is not None:
            mask = mask_of(fields, self.mask, target)
            losses = self._losses(output, without_missing(target, mask))
            return masked_sum(losses, mask), mask.sum()
        return self._loss(output, target), target.shape[0]

    def evaluate(self, model: nn.Module, fields: Fields) -> dict[str, tuple[Tensor, Tensor | int]]:
        """Return sums of the loss, and of absolute and squared errors."""
        output, target = self._compare(model, fields)
        output, target = output.double(), target.double()
        if self.mask is not None:
            mask = mask_of(fields, self.mask, target)
            target, count = without_missing(target, mask), mask.double().sum()
            errors = output - target
            return {
                "loss": (masked_sum(self._losses(output, target), mask), count),
                "mae": (masked_sum(errors.abs(), mask), count),
                "mse": (masked_sum(errors.square(), mask), count),
            }
        samples = target.shape[0]
        elements = max(1, target.numel() // samples)
        errors = output - target
        return {
            "loss": (self._loss(output, target), samples),
            "mae": (errors.abs().sum() / elements, samples),
            "mse": (errors.square().sum() / elements, samples),
        }

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
