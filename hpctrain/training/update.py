"""The update of a step: the norm of its gradient, clipping, and steps that are not applied.

Numbers stay on the device; no step waits for them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from hpctrain.training.model.precision import LossScale, real_view
from hpctrain.training.nonfinite import BadSteps
from hpctrain.training.optim.optimizer import refuses_on_device, set_learning_rate


class Update:
    """Applies the gradients of a step to the parameters, unless they are not finite.

    Numbers stay on the device; no step waits for them.

    Attributes:
        optimizer: of the parameters.
        syncs: whether every step waits for the device, because the optimizer cannot refuse a bad
            update by itself.
        grad_norm: norm of the whole gradient in the last step, before clipping, ().
        bad_steps: those whose gradient was not finite. None was applied. In mixed float16, an
            overflow that a smaller loss scale may cure counts as not applied, but not as bad.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        clip_norm: float | None,
        clip_value: float | None = None,
        scaler: LossScale,
        device: torch.device,
        counted: Callable[[list[Tensor]], list[Tensor]] | None = None,
        reduce_norm: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.optimizer = optimizer
        self._counted = counted
        self._reduce_norm = reduce_norm
        self._scaler = scaler
        self.syncs = not refuses_on_device(optimizer)
        # Where nobody waits to look at a flag, that costs less than a kernel that reads it.
        self._looks = self.syncs or not runs_ahead(device)
        parameters = [item for group in optimizer.param_groups for item in group["params"]]
        dtypes = {parameter.dtype.to_real() for parameter in parameters}
        self._complex = any(parameter.is_complex() for parameter in parameters)
        # A norm of many numbers needs more than the 8 bits of a bfloat16.
        self._norm_dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        self._cast = None if dtypes == {self._norm_dtype} else self._norm_dtype
        self._clip_norm = self._constant(clip_norm, device) if clip_norm is not None else None
        self._clip_value = clip_value
        self._zero = self._constant(0.0, device)
        self._one = self._constant(1.0, device)
        self._epsilon = self._constant(1e-6, device)
        self.grad_norm = self._constant(0.0, device)
        self.bad_steps = BadSteps(device)
        self._before: Callable[[], None] | None = None

    def call_before(self, do: Callable[[], None]) -> None:
        """Call something once, before the next time that the optimizer's state changes."""
        self._before = do

    def apply(
        self,
        gradients: list[Tensor],
        lr: float | None,
        factor: Tensor | None,
        look: Callable[[], list[Tensor]] | None = None,
    ) -> None:
        """Update the parameters by their gradients. Where ranks hold parts, collective: all ranks.

        Args:
            gradients: of all parameters that have one, or of what this rank holds of them; changed
                in place.
            lr: learning rate; None: the groups of the optimizer have it.
            factor: by which the gradients are too small, (); None: they are not.
            look: called once the gradients are what they stand for; returns them, whatever has
                become of them.
        """
        if self._complex:
            # The norm is that of real and imaginary parts, and real factors multiply both.
            gradients = [real_view(item) for item in gradients]
        if factor is not None:
            factor = factor.to(self._norm_dtype)
        if self._scaler.enabled:
            factor = (self._one if factor is None else factor) / self._scaler.scale
        if look is not None:
            gradients, factor = self._looked_at(gradients, factor, look), None
        norm = self.grad_norm = self._norm(gradients, factor)
        # Infinity less itself is not a number, and what is not a number does not equal 0.
        bad = torch.ne(norm - norm, self._zero, out=self.bad_steps.next_flag())
        if self._clip_norm is not None:
            # As torch's clip_grad_norm_ has it.
            clip = torch.minimum(self._clip_norm / (norm + self._epsilon), self._one)
            factor = clip if factor is None else clip * factor
        if factor is not None and gradients:
            torch._foreach_mul_(gradients, factor)
        if self._clip_value is not None and gradients:
            torch._foreach_clamp_min_(gradients, -self._clip_value)
            torch._foreach_clamp_max_(gradients, self._clip_value)
        if self._before is not None:
            self._before()
            self._before = None
        if lr is not None:
            set_learning_rate(self.optimizer, lr)
        if not self._looks:
            # Fused kernels read this flag and leave parameters and their own state alone.
            self.optimizer.found_inf = bad  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not bad.item():
            self.optimizer.step()
        if self._scaler.enabled:
            self._scaler.update(bad)

    def _looked_at(
        self, gradients: list[Tensor], factor: Tensor | None, look: Callable[[], list[Tensor]]
    ) -> list[Tensor]:
        """Return the gradients once they are what they stand for, and somebody has seen them."""
        if factor is not None and gradients:
            torch._foreach_mul_(gradients, factor)
        gradients = look()
        return [real_view(item) for item in gradients] if self._complex else gradients

    def _norm(self, gradients: list[Tensor], factor: Tensor | None) -> Tensor:
        """Return the norm of the whole gradient, (), once all is multiplied by `factor`."""
        if self._counted is not None:
            gradients = self._counted(gradients)
        norm = self._zero
        if gradients:  # else no parameter had a part in this step
            norms = torch._foreach_norm(gradients, 2, dtype=self._cast)
            norm = torch.linalg.vector_norm(torch.stack(norms))
        if self._reduce_norm is not None:
            norm = self._reduce_norm(norm)
        return norm if factor is None else norm * factor

    def _constant(self, value: float, device: torch.device) -> Tensor:
        """Return a number as a tensor: a Python number is made one in every operation, slowly."""
        return torch.tensor(value, dtype=self._norm_dtype, device=device)


def runs_ahead(device: torch.device) -> bool:
    """Tell whether the host goes on while the device computes, and waits where it reads of it."""
    return device.type != "cpu"
