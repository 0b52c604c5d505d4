"""In which number formats FSDP gathers a unit, and sums its gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.modules.batchnorm import _NormBase

from hpctrain.training.step.precision import NumberFormat


def unit_policy(
    unit: nn.Module, units: Sequence[nn.Module], number_format: NumberFormat, dtype: torch.dtype
) -> MixedPrecisionPolicy:
    """Return in which formats a unit is gathered, and its gradients are summed.

    Args:
        unit: the module.
        units: all of them.
        number_format: of the arithmetic.
        dtype: of the parameters that are spread.
    """
    inner = {
        id(module)
        for other in units
        if other is not unit
        for module in other.modules()
        if not any(module_inside is unit for module_inside in other.modules())
    }
    own = [module for module in unit.modules() if id(module) not in inner]
    # Batch norms mix their weights with running statistics, which stay as they are.
    mixes = any(isinstance(module, _NormBase) for module in own)
    narrow = None if mixes or dtype != torch.float32 else number_format.autocast
    return MixedPrecisionPolicy(
        param_dtype=narrow,
        reduce_dtype=torch.float64 if dtype == torch.float64 else torch.float32,
        cast_forward_inputs=False,
    )
