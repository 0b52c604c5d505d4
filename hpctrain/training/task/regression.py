"""Regression: numbers compared with numbers; losses, built-in or a user's, as sums over samples."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpctrain.config.registry import resolve
from hpctrain.config.schema import ComponentSection
from hpctrain.errors import ConfigError, TrainingError
from hpctrain.training.task.task import (
    Direction,
    Fields,
    Supervised,
    mask_of,
    masked_sum,
    weight_of,
    without_missing,
)
from hpctrain.utils.text import did_you_mean

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


SummedLoss = Callable[[Tensor, Tensor], Tensor]
"""(output, target), both (samples, ...), to the sum of the samples' losses, ()."""

LossReduction = Literal["sum", "per-sample-mean"]
_REDUCTIONS: tuple[str, ...] = get_args(LossReduction)


def load_loss(
    reference: str, reduction: LossReduction | None, arguments: Mapping[str, Any]
) -> SummedLoss:
    """Return a loss that sums over the samples of a batch.

    A global batch is cut into shares of any size, and its loss is put together again from their
    sums. So a loss has to give a sum, or a mean over samples, from which the sum follows.

    Args:
        reference: "mse", "mae", or an import path.
        reduction: what a loss by import path returns; None: to be found out.
        arguments: of a loss by import path.

    Raises:
        ConfigError: if the loss cannot be found, or no sum over samples be had from it.
    """
    if reduction is not None and reduction not in _REDUCTIONS:
        near = did_you_mean(str(reduction), _REDUCTIONS, quote='"')
        raise _mistake("loss_reduction", reduction, f"expected {_either()}{near}")
    if reference in _BUILTIN:
        if reduction is not None or arguments:
            raise _mistake("loss", reference, "takes no loss_reduction and no loss_arguments")
        return _BUILTIN[reference]
    if ":" not in reference:
        raise _mistake(
            "loss",
            reference,
            'expected "mse", "mae" or "package.module:Name"'
            + did_you_mean(reference, _BUILTIN, quote='"'),
        )
    try:
        target = resolve("task", ComponentSection(use=reference))
    except ConfigError as error:
        raise _mistake("loss", reference, str(error)) from error
    loss = _instance(reference, target, reduction, arguments)
    found = _reduction(reference, loss, reduction)
    if found == "per-sample-mean" and _has_weights(loss, arguments):
        raise _mistake(
            "loss",
            reference,
            "it has weights of its own and gives a mean, which it divides by the sum of its "
            "weights. That differs from rank to rank, so the mean of the global batch cannot be "
            'had from those of its parts. Use reduction = "sum", or write a task with '
            "counts_samples = False",
        )
    return UserLoss(reference, loss, found)


def load_elementwise_loss(reference: str, arguments: Mapping[str, Any]) -> SummedLoss:
    """Return a loss of every element by itself, for a mask to take its part of them.

    Args:
        reference: "mse", "mae", or the import path of one that takes `reduction`.
        arguments: of a loss by import path.

    Raises:
        ConfigError: if the loss cannot be found, or reduces what it returns in any case.
    """
    if reference in _BUILTIN or ":" not in reference:
        load_loss(reference, None, arguments)  # which says what is wrong with it
        return functools.partial(_BUILTIN_FUNCTIONS[reference], reduction="none")
    try:
        target = resolve("task", ComponentSection(use=reference))
    except ConfigError as error:
        raise _mistake("loss", reference, str(error)) from error
    if not _takes_reduction(target):
        raise _mistake(
            "loss",
            reference,
            'it takes no reduction = "none", so a mask cannot take a part of what it returns. Give '
            "it that argument, or write a task of your own, which finds the mask among its fields",
        )
    loss = _instance(reference, target, None, {**arguments, "reduction": "none"})
    return ElementwiseLoss(reference, loss)


class ElementwiseLoss:
    """A user's loss of every element."""

    def __init__(self, reference: str, loss: Callable[..., Tensor]) -> None:
        self._reference = reference
        self._loss = loss

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each element, of their shape.

        Raises:
            TrainingError: if the loss returned something else.
        """
        if isinstance(self._loss, nn.Module):
            self._loss.to(output.device)
        value = self._loss(output, target)
        if not isinstance(value, Tensor) or value.shape != target.shape:
            what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise TrainingError(
                f'task.loss {self._reference} returned {what} for reduction = "none", where a mask '
                f"needs a number for each element of the target, {tuple(target.shape)}"
            )
        return value


class UserLoss:
    """A user's loss as a sum over samples."""

    def __init__(
        self, reference: str, loss: Callable[..., Tensor], reduction: LossReduction
    ) -> None:
        self._reference = reference
        self._loss = loss
        self._averages = reduction == "per-sample-mean"
        self._placed = not isinstance(loss, nn.Module)

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the sum of the losses, ().

        Args:
            output: of the model, (samples, ...).
            target: what it is compared with, (samples, ...).

        Raises:
            TrainingError: if the loss returned anything but one number.
        """
        if not self._placed:
            assert isinstance(self._loss, nn.Module)
            self._loss.to(output.device)
            self._placed = True
        value = self._loss(output, target)
        if not isinstance(value, Tensor) or value.ndim != 0:
            what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise TrainingError(
                f"task.loss {self._reference} returned {what} for a batch of {len(output)}: it has "
                "to reduce it to one number"
            )
        return value * len(output) if self._averages else value


def _mean_over_elements(function: Callable[..., Tensor], output: Tensor, target: Tensor) -> Tensor:
    loss_sum = function(output, target, reduction="sum")
    return loss_sum if output.ndim == 1 else loss_sum * (len(output) / output.numel())


_BUILTIN_FUNCTIONS: Mapping[str, Callable[..., Tensor]] = {"mse": F.mse_loss, "mae": F.l1_loss}

_BUILTIN: Mapping[str, SummedLoss] = {
    name: functools.partial(_mean_over_elements, function)
    for name, function in _BUILTIN_FUNCTIONS.items()
}


def _instance(
    reference: str,
    target: Callable[..., Any],
    reduction: LossReduction | None,
    arguments: Mapping[str, Any],
) -> Callable[..., Tensor]:
    """Return a function of (output, target), made to sum where that can be done."""
    chosen = dict(arguments)
    if _takes_reduction(target) and reduction != "per-sample-mean":
        chosen.setdefault("reduction", "sum")
    if not inspect.isclass(target):
        if isinstance(target, nn.Module) and chosen:
            raise _mistake("loss_arguments", chosen, f"{reference} is an object already")
        return functools.partial(target, **chosen) if chosen else target
    try:
        loss = target(**chosen)
    except (TypeError, ValueError) as error:
        raise _mistake("loss", reference, f"refuses its arguments: {error}") from error
    if not callable(loss):
        raise _mistake("loss", reference, "its objects cannot be called")
    if isinstance(loss, nn.Module) and any(True for _ in loss.parameters()):
        raise _mistake(
            "loss",
            reference,
            "it has parameters, which no optimizer would train. Make them a part of the model, "
            "and write a task of your own",
        )
    return loss


def _reduction(
    reference: str, loss: Callable[..., Tensor], declared: LossReduction | None
) -> LossReduction:
    own = getattr(loss, "reduction", None)
    if own is None and isinstance(loss, functools.partial):
        own = loss.keywords.get("reduction")
    found: dict[Any, LossReduction] = {"sum": "sum", "mean": "per-sample-mean"}
    if own is not None and own not in found:
        raise _mistake("loss", reference, f'it has reduction = "{own}", but one number is needed')
    if own is not None and declared not in (None, found[own]):
        raise _mistake("loss_reduction", declared, f'but {reference} has reduction = "{own}"')
    if own is not None:
        return found[own]
    if declared is None:
        raise _mistake(
            "loss",
            reference,
            f"say with task.loss_reduction what it returns for a batch: {_either()}",
        )
    return declared


def _takes_reduction(target: Callable[..., Any]) -> bool:
    try:
        return "reduction" in inspect.signature(target).parameters
    except (TypeError, ValueError):  # written in C without a signature
        return False


def _has_weights(loss: Callable[..., Tensor], arguments: Mapping[str, Any]) -> bool:
    return getattr(loss, "weight", None) is not None or arguments.get("weight") is not None


def _either() -> str:
    return " or ".join(f'"{name}"' for name in _REDUCTIONS)


def _mistake(key: str, value: object, text: str) -> ConfigError:
    shown = f'"{value}"' if isinstance(value, str) else f"{value}"
    return ConfigError(f"task.{key} = {shown}: {text}")
