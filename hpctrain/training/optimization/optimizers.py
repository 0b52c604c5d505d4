"""Optimizers: built with fused kernels where these are right, so that bad updates are refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from hpctrain.checkpoint.state import HasParameters
from hpctrain.config.schema import ParameterGroup
from hpctrain.errors import ConfigError
from hpctrain.training.optimization.evaluation_weights import begin_training
from hpctrain.training.optimization.fused import refuse_unknown_kernels, unknown_because
from hpctrain.training.optimization.parameter_groups import LR_FACTOR, parameter_groups

_ELEMENTWISE = {
    *("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax"),
    *("NAdam", "RAdam", "RMSprop", "Rprop", "SGD"),
}
# The same of others' packages; compared in tests/unit/training/test_sharding.py.
_ELEMENTWISE_OF_OTHERS = {
    ("schedulefree", name) for name in ("AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree")
}
# Who names one of these has chosen an implementation.
_IN_WORDS = (TypeError, ValueError, RuntimeError)
_OF_CONSTRUCTORS = (*_IN_WORDS, AttributeError, LookupError, AssertionError, ImportError)
_IMPLEMENTATIONS = {"fused", "foreach", "capturable", "differentiable"}


def build_optimizer(
    target: Callable[..., Any],
    model: HasParameters,
    lr: float,
    arguments: Mapping[str, Any],
    *,
    groups: Sequence[ParameterGroup] = (),
    decay_norms_and_biases: bool = True,
) -> Optimizer:
    """Return an optimizer of the trainable parameters.

    Takes the fused kernels where they are known to be right and the user has not chosen: they are
    the fastest, and they look at the flag of a non-finite gradient on the device.

    Args:
        target: a class of torch.optim, or one like them.
        model: on the device, in the dtype that it is trained in; or what this rank holds of it.
        lr: learning rate.
        arguments: further keyword arguments; arrays of the config become tuples.
        groups: parameters that are trained differently.
        decay_norms_and_biases: False: no weight decay on parameters of fewer than two dimensions.

    Raises:
        ConfigError: if there is nothing to train, a pattern fits nothing, or the class refuses its
            arguments, is not a torch optimizer, is one that steps by itself, or is to use fused
            kernels that are not known to be right.
    """
    chosen_groups = parameter_groups(model, groups, decay_norms_and_biases=decay_norms_and_biases)
    parameters = [item for group in chosen_groups for item in group["params"]]
    if not parameters:
        raise ConfigError(
            f"model: {type(model).__name__} has no parameter that requires a gradient: there is "
            "nothing to train"
        )
    chosen = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in arguments.items()
    }
    if _fused_kernels_fit(target, parameters, chosen):
        chosen["fused"] = True
    for group in chosen_groups:
        group["lr"] = lr * group.get(LR_FACTOR, 1.0)
    try:
        # Without a group of its own, the plain list: what any optimizer takes.
        plain = len(chosen_groups) == 1 and chosen_groups[0].keys() == {"params", "lr"}
        optimizer = target(parameters if plain else chosen_groups, lr=lr, **chosen)
    except _OF_CONSTRUCTORS as error:
        told = str(error) if isinstance(error, _IN_WORDS) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"[optimizer] cannot be built: {told}") from error
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"[optimizer] use: {type(optimizer).__name__} is not a torch.optim.Optimizer"
        )
    refuse_unknown_kernels(optimizer)
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ConfigError(
            f"[optimizer] use: {type(optimizer).__name__} evaluates the model several times a "
            "step by itself (it needs a closure), which a step over ranks cannot do"
        )
    if "weight_decay" not in optimizer.defaults and any("weight_decay" in g for g in chosen_groups):
        raise ConfigError(
            f"[optimizer] use: {type(optimizer).__name__} has no weight decay: leave out "
            "weight_decay in optimizer.groups, and decay_norms_and_biases"
        )
    prepare_momentum(optimizer)
    begin_training(optimizer)
    return optimizer


def refuse_whole_tensors(optimizer: Optimizer) -> None:
    """Refuse optimizers that have to see whole tensors, where a rank has some rows of each.

    A class of the user's own says by an attribute `elementwise = True` that every element is
    updated by itself.

    Raises:
        ConfigError: if the optimizer is not known to work element by element.
    """
    kind = type(optimizer)
    known = (kind.__module__.startswith("torch.optim.") and kind.__name__ in _ELEMENTWISE) or (
        (kind.__module__.partition(".")[0], kind.__name__) in _ELEMENTWISE_OF_OTHERS
    )
    if not (known or getattr(kind, "elementwise", False)):
        raise ConfigError(
            f'[optimizer] use: with training.strategy = "fsdp" each rank has some rows of every '
            f"parameter, and {kind.__name__} is not known to update each element by itself. Those "
            f"of torch that do are {', '.join(sorted(_ELEMENTWISE))}; a class of your own says so "
            'by the attribute elementwise = True. With "ddp" any of them trains'
        )


def refuses_on_device(optimizer: Optimizer) -> bool:
    """Tell whether the optimizer looks at `found_inf` itself, without a host sync.

    Source: torch.amp.GradScaler.step, which asks the same.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of all groups. A plain number: kernels take it along, no copy."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get(LR_FACTOR, 1.0)


def _fused_kernels_fit(
    target: Callable[..., Any], parameters: list[nn.Parameter], arguments: Mapping[str, Any]
) -> bool:
    """Tell whether to ask for fused kernels, of which nobody has spoken."""
    if not inspect.isclass(target) or not issubclass(target, Optimizer):
        return False
    try:
        known = inspect.signature(target).parameters
    except (TypeError, ValueError):  # written in C without a signature
        return False
    # With dampening the first step of SGD differs from the others, see `prepare_momentum`.
    return (
        "fused" in known
        and not arguments.keys() & _IMPLEMENTATIONS
        and not (issubclass(target, SGD) and arguments.get("dampening"))
        and unknown_because(target, parameters) is None
    )


def prepare_momentum(optimizer: Optimizer) -> None:
    """Give fused SGD momentum buffers of zeros where it has none yet.

    It would make them in its first step, uninitialised, and where that step is refused they stay
    so: seen in torch 2.13. From zeros the first step does the same, unless there is dampening.

    Raises:
        ConfigError: if the user asked for fused kernels and dampening.
    """
    if not isinstance(optimizer, SGD) or not refuses_on_device(optimizer):
        return
    for group in optimizer.param_groups:
        if not group["momentum"]:
            continue
        if group["dampening"]:
            raise ConfigError("optimizer.fused = true: not together with dampening; leave it out")
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)
