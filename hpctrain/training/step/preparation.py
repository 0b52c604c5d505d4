"""What is done to a model before it is trained: none of it changes what it computes.

But for SyncBatchNorm, whose statistics are those of all ranks, and TF32, which rounds.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hpctrain.config.messages import did_you_mean
from hpctrain.config.schema import TrainingSection
from hpctrain.errors import ConfigError
from hpctrain.training.step.precision import NumberFormat


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
        ConfigError: if a pattern of `training.activation_checkpointing` fits no module.
    """
    if section.tf32 is not None and device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = section.tf32
        torch.backends.cudnn.allow_tf32 = section.tf32
    if section.sync_batchnorm and world_size > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    spread = is_spread(section, world_size)
    place = None if spread else device
    model = model.to(device=place, dtype=number_format.parameters)
    if number_format.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    checkpoint_activations(model, section.activation_checkpointing)
    if section.compile and not spread:
        model.compile(mode=section.compile_mode)
    return model


def is_spread(section: TrainingSection, world_size: int) -> bool:
    """Tell whether every rank holds a part of the parameters only; one process holds them all."""
    return section.strategy == "fsdp" and world_size > 1


def checkpoint_activations(model: nn.Module, patterns: Sequence[str]) -> None:
    """Have modules compute their activations again in the backward pass, in place of keeping them.

    Args:
        model: whose modules.
        patterns: of their names, with * and ? as in file names.

    Raises:
        ConfigError: if a pattern fits no module.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    for pattern in patterns:
        found = [name for name in modules if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            hint = did_you_mean(pattern, modules, quote='"')
            raise ConfigError(
                f'training.activation_checkpointing = "{pattern}": fits no module of the model'
                f"{hint} (names are such as {', '.join(list(modules)[:4])})"
            )
        for name in found:
            module = modules[name]
            # A wrapper module would change the names of all parameters inside.
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
