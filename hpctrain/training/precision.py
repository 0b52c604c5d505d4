"""Number formats: what the parameters are kept in, and what the arithmetic runs in."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from hpctrain.config.schema import Precision


@dataclass(frozen=True, slots=True)
class NumberFormat:
    """One of the precision names, on one kind of device.

    Attributes:
        parameters: dtype of parameters, and of floating-point inputs.
        autocast: dtype of matrix products in mixed precision; None: as the parameters.
        scaled: whether gradients are scaled up so that they do not underflow in float16.
    """

    device_type: str
    parameters: torch.dtype
    autocast: torch.dtype | None = None
    scaled: bool = False

    @classmethod
    def of(cls, precision: Precision, device: torch.device) -> NumberFormat:
        """Return the format that a name stands for."""
        kind = device.type
        formats = {
            "32-true": cls(kind, torch.float32),
            "64-true": cls(kind, torch.float64),
            "bf16-true": cls(kind, torch.bfloat16),
            "bf16-mixed": cls(kind, torch.float32, torch.bfloat16),
            "16-mixed": cls(kind, torch.float32, torch.float16, scaled=True),
        }
        return formats[precision]

    def arithmetic(self) -> AbstractContextManager[object]:
        """Return the context in which a model runs forward."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.autocast)

    def cast(self, fields: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the fields with floating-point ones in the dtype of the parameters."""
        return {
            name: tensor.to(self.parameters)
            if tensor.is_floating_point() and tensor.dtype != self.parameters
            else tensor
            for name, tensor in fields.items()
        }
