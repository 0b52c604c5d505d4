"""Losses: the built-in ones, and a user's own, brought to one form: a sum over samples."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from hpctrain.config.registry import resolve
from hpctrain.config.schema import ComponentSection
from hpctrain.errors import ConfigError, TrainingError
from hpctrain.utils.text import did_you_mean

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
    """Return a function of (output, target), told to sum where it can be told."""
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
