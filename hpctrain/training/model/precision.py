"""Precision: number formats of parameters and arithmetic (autocast), and the loss scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hpctrain.config.schema import Precision
from hpctrain.data.loading.batch import map_tensors
from hpctrain.training.nonfinite import FORGIVEN


@dataclass(frozen=True, slots=True)
class NumberFormat:
    """One of the precision names, on one kind of device.

    Attributes:
        parameters: dtype of floating-point inputs, and of parameters where the model is cast.
        autocast: dtype of matrix products in mixed precision; None: as the parameters.
        casts: whether the model is cast; else it keeps the dtypes that its maker gave it.
        scaled: whether gradients are scaled up so that they do not underflow in float16.
        channels_last: whether inputs of four dimensions have their channels last in memory.
    """

    device_type: str
    parameters: torch.dtype
    autocast: torch.dtype | None = None
    casts: bool = False
    scaled: bool = False
    channels_last: bool = False

    @classmethod
    def of(
        cls, precision: Precision, device: torch.device, *, channels_last: bool = False
    ) -> NumberFormat:
        """Return the format that a name stands for."""
        kind = device.type
        formats = {
            "32-true": cls(kind, torch.float32),
            "64-true": cls(kind, torch.float64, casts=True),
            "bf16-true": cls(kind, torch.bfloat16, casts=True),
            "bf16-mixed": cls(kind, torch.float32, torch.bfloat16),
            "16-mixed": cls(kind, torch.float32, torch.float16, scaled=True),
        }
        return replace(formats[precision], channels_last=channels_last)

    def arithmetic(self) -> AbstractContextManager[object]:
        """Return the context in which a model runs forward; it can be entered again and again."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.autocast)

    def for_model(self, model: nn.Module) -> NumberFormat:
        """Return the format whose inputs have the dtype of a model that was made in one other."""
        dtypes = {real_dtype(item.dtype) for item in model.parameters()} - {None}
        (only, *others) = dtypes or {self.parameters}
        return replace(self, parameters=self.parameters if others or only is None else only)

    def fitting(self, dtype: torch.dtype) -> torch.dtype:
        """Return what a dtype is cast to in this format; integers and 8-bit floats are not."""
        if real_dtype(dtype) is None:
            return dtype
        if not dtype.is_complex:
            return self.parameters
        return torch.complex128 if self.parameters == torch.float64 else torch.complex64

    def cast(self, fields: Any, inputs: Sequence[str]) -> Any:
        """Return the fields with floating-point and complex inputs in the format's dtypes.

        Targets stay: a loss is computed in at least float32. Where nobody says which the inputs
        are, as of a module, all tensors are cast, and only where the model is.

        Args:
            fields: by name; without inputs, of any structure.
            inputs: their names.
        """
        if not inputs:
            return self._cast_all(fields)
        cast = fields
        for name in inputs:
            # Most are right already, in every pass of every step.
            if (tensor := fields[name]).dtype != self.parameters:
                cast = {**cast, name: tensor.to(self.fitting(tensor.dtype))}
        if not self.channels_last:
            return cast
        images = {name: cast[name] for name in inputs if cast[name].ndim == 4}
        return {
            **cast,
            **{
                name: image.contiguous(memory_format=torch.channels_last)
                for name, image in images.items()
            },
        }

    def _cast_all(self, fields: Any) -> Any:
        """Return any structure with its tensors as the model's own, where that is cast."""
        if self.casts:
            fields = map_tensors(lambda tensor: tensor.to(self.fitting(tensor.dtype)), fields)
        if self.channels_last:
            fields = map_tensors(_channels_last, fields)
        return fields


def _channels_last(tensor: Tensor) -> Tensor:
    is_image = tensor.ndim == 4 and tensor.is_floating_point()
    return tensor.contiguous(memory_format=torch.channels_last) if is_image else tensor


def real_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """Return the dtype of the numbers that a tensor is made of; a complex one is made of two.

    None for integers, and for floats of 8 bits and less, which are codes for something else.
    """
    real = dtype.to_real()
    return real if real.is_floating_point and real.itemsize > 1 else None


def real_view(tensor: Tensor) -> Tensor:
    """Return complex numbers as pairs of real ones in the same memory, and real ones as they are.

    Of a conjugate that torch has not computed yet, the pairs of the original.
    """
    if not tensor.is_complex():
        return tensor
    return torch.view_as_real(tensor.conj() if tensor.is_conj() else tensor)


class LossScale:
    """The factor that keeps small gradients above the underflow of float16, found by trial.

    It falls by half where a gradient overflowed, and doubles after a long time without. All on the
    device. torch's GradScaler does the same to its own copy of the gradients' norm and flag; here
    they are shared with clipping, so that gradients are read and multiplied once.

    Source: Micikevicius et al., "Mixed Precision Training" (2018); the numbers are GradScaler's.

    Attributes:
        enabled: False: gradients come unscaled, and there is no state.
        scale: (), float32, 1 to 2^32.
    """

    INITIAL = 2.0**16
    LARGEST = 2.0**32
    STEPS_TO_GROWTH = 2000

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self.enabled = enabled
        self.scale = torch.full((), self.INITIAL if enabled else 1.0, device=device)
        self._steps = torch.zeros((), device=device)

    def update(self, overflowed: Tensor) -> None:
        """Take note of a step, and forgive an overflow that a smaller scale may cure.

        Args:
            overflowed: (), float32, 1 where its gradient was not finite; becomes FORGIVEN where
                the scale could still fall.
        """
        self._steps.add_(1).mul_(1 - overflowed)
        grows = (self._steps >= self.STEPS_TO_GROWTH).float()
        self._steps.mul_(1 - grows)
        may_fall = self.scale > 1
        self.scale.mul_((1 + grows) * (1 - overflowed / 2)).clamp_(1.0, self.LARGEST)
        overflowed.mul_(torch.where(may_fall, FORGIVEN, 1.0))

    def state_dict(self) -> dict[str, float]:
        """Return the state as numbers; waits for the device."""
        if not self.enabled:
            return {}
        return {"scale": self.scale.item(), "steps": self._steps.item()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; one of another precision says nothing."""
        if self.enabled and state:
            self.scale.fill_(state["scale"])
            self._steps.fill_(state["steps"])
