"""Parameters and buffers in the dtypes and the place that a run computes in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hpctrain.training.step.patterns import fitting_modules
from hpctrain.training.step.precision import NumberFormat


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
