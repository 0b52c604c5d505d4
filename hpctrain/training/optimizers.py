"""Optimizers: built with fused kernels where they exist, so that bad updates can be refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hpctrain.errors import ConfigError


def build_optimizer(
    target: Callable[..., Any], model: nn.Module, lr: float, arguments: Mapping[str, Any]
) -> Optimizer:
    """Return an optimizer of the trainable parameters.

    Asks for the fused kernels where the class has them and the user has not chosen: they are the
    fastest, and take the flag of a non-finite gradient on the device.

    Raises:
        ConfigError: if the class refuses its arguments or is no torch optimizer.
    """
    parameters = [item for item in model.parameters() if item.requires_grad]
    chosen = dict(arguments)
    if "fused" in inspect.signature(target).parameters and not chosen.keys() & {"fused", "foreach"}:
        chosen["fused"] = True
    try:
        optimizer = target(parameters, lr=lr, **chosen)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"[optimizer] cannot be built: {error}") from error
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"[optimizer] use: {type(optimizer).__name__} is no torch.optim.Optimizer"
        )
    return optimizer


def is_fused(optimizer: Optimizer) -> bool:
    """Tell whether the optimizer's own kernels can refuse a bad update, without a host sync."""
    return all(group.get("fused") for group in optimizer.param_groups) and bool(
        getattr(optimizer, "_step_supports_amp_scaling", False)
    )


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr
