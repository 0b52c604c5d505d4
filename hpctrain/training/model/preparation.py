"""What is done to a model before it is trained: none of it changes what it computes.

But for SyncBatchNorm, whose statistics are those of all ranks, and TF32, which rounds.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.checkpoint import checkpoint

from hpctrain.config.schema import TrainingSection
from hpctrain.errors import ConfigError
from hpctrain.training.model.precision import NumberFormat
from hpctrain.utils.text import did_you_mean, listed


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


def cast_model(
    model: nn.Module,
    number_format: NumberFormat,
    device: torch.device | None,
    keep_dtype: Sequence[str] = (),
) -> None:
    """Move a model, and cast it where the format says so; changed in place.

    `Module.to` would make complex numbers real, and say so in a warning only. Here they stay
    complex, and tensors that modules share stay shared.

    Args:
        model: as its maker made it.
        number_format: whether to cast, and to what.
        device: to move to; None: it stays where it is.
        keep_dtype: names of modules, with * and ?, or of their classes, that are not cast.

    Raises:
        ConfigError: if a pattern of `keep_dtype` fits no module.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    kept = {
        id(tensor)
        for pattern in keep_dtype
        for name in fitting_modules(modules, pattern, "training.keep_dtype")
        for tensor in (*modules[name].parameters(), *modules[name].buffers())
    }
    # Holds the originals, too: the id of one that is gone could be that of another.
    done: dict[int, tuple[Tensor, Tensor]] = {}

    def placed(tensor: Tensor) -> Tensor:
        if id(tensor) not in done:
            casts = number_format.casts and id(tensor) not in kept
            dtype = number_format.fitting(tensor.dtype) if casts else tensor.dtype
            done[id(tensor)] = (tensor, _plain(tensor.to(device=device, dtype=dtype)))
        return done[id(tensor)][1]

    # As `Module.to` does it, so that modules that have their own part in it have it here.
    model._apply(placed)


def _plain(tensor: Tensor) -> Tensor:
    """Return a tensor whose memory holds each of its elements as it is, and once."""
    if is_lazy(tensor):
        return tensor
    tensor = tensor.resolve_conj().resolve_neg()
    repeats = any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )
    return tensor.contiguous() if repeats else tensor


_SHOWN = 4


def fitting_modules(modules: Mapping[str, nn.Module], pattern: str, key: str) -> list[str]:
    """Return the names of the modules that a pattern fits, in their order.

    Args:
        modules: of the model, by name.
        pattern: of names, with * and ?, or the name of a class.
        key: of the config, for the message.

    Raises:
        ConfigError: if it fits none.
    """
    found = [
        name
        for name, module in modules.items()
        if fnmatch.fnmatchcase(name, pattern) or type(module).__name__ == pattern
    ]
    if not found:
        known = [*modules, *{type(module).__name__ for module in modules.values()}]
        raise ConfigError(
            f'{key} = "{pattern}": fits no module of the model and none of their '
            f"classes{did_you_mean(pattern, known, quote=chr(34))} (names are such as "
            f"{', '.join(list(modules)[:_SHOWN])})"
        )
    return found


def cast_as_begun(model: nn.Module, dtype: torch.dtype, precision: str) -> list[str]:
    """Make all of a model that is not whole numbers one dtype, as a run of 0.1.0 has it.

    Args:
        model: as its maker made it.
        dtype: of the run's parameters.
        precision: as the config says it.

    Returns:
        A line where that changes a tensor, for the header.

    Raises:
        ConfigError: if it would take the imaginary part of complex numbers, which is what 0.1.0
            has trained without.
    """
    named = dict(chain(model.named_parameters(), model.named_buffers()))
    complex_ones = [name for name, tensor in named.items() if tensor.is_complex()]
    if complex_ones:
        raise ConfigError(
            f'training.precision = "{precision}": this run was begun by hpctrain 0.1.0, which made '
            f"{listed(complex_ones, _SHOWN)} of the model real and so trained another model than "
            "this one. Start a new run (run.name), with checkpoint.initialize_from if its weights "
            "are of use"
        )
    changed = [
        name
        for name, tensor in named.items()
        if tensor.is_floating_point() and tensor.dtype != dtype
    ]
    model.to(dtype=dtype)
    if not changed:
        return []
    return [
        f"{listed(changed, _SHOWN)} of the model: {dtype}, as the run began; a new one keeps dtypes"
    ]
