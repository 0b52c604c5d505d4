"""What is done to a model before it is trained: none of it changes what it computes.

But for SyncBatchNorm, whose statistics are those of all ranks, and TF32, which rounds.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hpctrain.config.schema import TrainingSection
from hpctrain.errors import ConfigError
from hpctrain.training.step.casting import cast_model
from hpctrain.training.step.patterns import fitting_modules
from hpctrain.training.step.precision import NumberFormat
from hpctrain.utils.text import listed


def prepare_model(
    model: nn.Module,
    section: TrainingSection,
    number_format: NumberFormat,
    device: torch.device,
    world_size: int,
) -> nn.Module:
    """Return the model on the device, in its number format, as the config wants it.

    Where its parameters are to be spread over the ranks it stays on the host, which may have room
    for it when a device has not, and it is compiled later, unit by unit.

    Names of parameters and buffers stay as they are.

    Raises:
        ConfigError: if a pattern of `training.keep_dtype` or `training.activation_checkpointing`
            fits no module, or complex gradients are to be compressed.
    """
    if world_size > 1 and section.compress_gradients != "none":
        _refuse_complex_gradients(model, section.compress_gradients)
    if section.tf32 is not None and device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = section.tf32
        torch.backends.cudnn.allow_tf32 = section.tf32
    if section.cudnn_benchmark and device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    if section.sync_batchnorm and world_size > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    spread = is_spread(section, world_size)
    cast_model(model, number_format, None if spread else device, section.keep_dtype)
    if number_format.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    checkpoint_activations(model, section.activation_checkpointing)
    if section.compile and not spread:
        model.compile(mode=section.compile_mode)
    return model


def is_spread(section: TrainingSection, world_size: int) -> bool:
    """Tell whether every rank holds a part of the parameters only; one process holds them all."""
    return section.strategy == "fsdp" and world_size > 1


def _refuse_complex_gradients(model: nn.Module, compression: str) -> None:
    """Refuse to compress complex gradients: torch would drop their imaginary parts.

    Raises:
        ConfigError: if the model has some.
    """
    names = [
        name for name, item in model.named_parameters() if item.requires_grad and item.is_complex()
    ]
    if names:
        raise ConfigError(
            f'training.compress_gradients = "{compression}": the parameters {listed(names)} are '
            "complex, and torch would drop the imaginary parts of their gradients. Leave the key "
            "out, or keep these parameters as pairs of real numbers"
        )


def checkpoint_activations(model: nn.Module, patterns: Sequence[str]) -> None:
    """Have modules compute their activations again in the backward pass, in place of keeping them.

    Args:
        model: whose modules.
        patterns: of their names, with * and ? as in file names, or names of their classes.

    Raises:
        ConfigError: if a pattern fits no module.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    for pattern in patterns:
        for name in fitting_modules(modules, pattern, "training.activation_checkpointing"):
            module = modules[name]
            # A wrapper module would change the names of all parameters inside.
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
