"""What 0.1.0 did to a model before it trained it, for runs that it has begun."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn

from hpctrain.errors import ConfigError
from hpctrain.utils.text import listed

_SHOWN = 4


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
