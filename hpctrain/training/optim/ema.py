"""Weights to evaluate with: a moving average (EMA), or those of an optimizer that has its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hpctrain.checkpoint.state import HasParameters


class WeightAverage:
    """Exponential moving average of the trained parameters, on their device.

    In at least float32: the last digits of a bfloat16 would swallow every update.

    Source: Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging" (1992);
    the decay that grows at the beginning is TensorFlow's ExponentialMovingAverage's.
    """

    def __init__(self, model: HasParameters, decay: float) -> None:
        """Begin with the parameters as they are.

        Args:
            model: whose parameters, or what this rank holds of them.
            decay: 0 to 1: how much of the average stays at each step.
        """
        trained = {name: item for name, item in model.named_parameters() if item.requires_grad}
        self._names = list(trained)
        self._parameters: list[Tensor] = list(trained.values())
        self._averages = [_wide(item.detach()).clone() for item in self._parameters]
        self._same = all(
            item.dtype == average.dtype
            for item, average in zip(self._parameters, self._averages, strict=True)
        )
        self._decay = decay

    def update(self, step: int) -> None:
        """Take the parameters in, after `step` steps in all."""
        weight = 1 - min(self._decay, (1 + step) / (10 + step))
        now = [item.detach() for item in self._parameters]
        torch._foreach_lerp_(
            self._averages, now if self._same else [_wide(item) for item in now], weight
        )

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Have the averages in the model in the body, and its own parameters after it."""
        with torch.no_grad():
            kept = [item.clone() for item in self._parameters]
            torch._foreach_copy_(self._parameters, self._averages)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._parameters, kept)

    def state(self) -> dict[str, Tensor]:
        """Return the averages by the names of the parameters."""
        return dict(zip(self._names, self._averages, strict=True))

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state; parameters that it lacks begin with their present values."""
        for name, average, parameter in zip(
            self._names, self._averages, self._parameters, strict=True
        ):
            average.copy_(state[name] if name in state else parameter.detach())


_WIDE = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.complex32: torch.complex64,
}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_WIDE.get(tensor.dtype, tensor.dtype))


def has_modes(optimizer: Optimizer) -> bool:
    """Tell whether an optimizer has one set of weights to train with and one to evaluate with."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def begin_training(optimizer: Optimizer) -> None:
    """Tell an optimizer that steps follow, if it wants to know."""
    if has_modes(optimizer):
        _modes(optimizer).train()


class EvaluationWeights:
    """The second set of weights of an optimizer that has modes, such as a schedule-free one.

    Its `eval()` computes them in the place of those that it trains with, and `train()` computes
    these again, rounded: a run would depend on how often it was evaluated. So they are kept aside.
    """

    def __init__(self, optimizer: Optimizer, model: HasParameters) -> None:
        """Take the optimizer in.

        Args:
            optimizer: in the mode for training.
            model: whose parameters, or what this rank holds of them.
        """
        self._optimizer = optimizer
        trained = {name: item for name, item in model.named_parameters() if item.requires_grad}
        self._names = list(trained)
        self._parameters: list[Tensor] = list(trained.values())

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Have the weights in the model in the body; after it those of training, bit for bit."""
        kept = [item.detach().clone() for item in self._parameters]
        _modes(self._optimizer).eval()
        try:
            yield
        finally:
            _modes(self._optimizer).train()
            with torch.no_grad():
                torch._foreach_copy_(self._parameters, kept)

    def state(self) -> dict[str, Tensor]:
        """Return copies of the weights by the names of the parameters."""
        with self.in_model():
            copies = [item.detach().clone() for item in self._parameters]
        return dict(zip(self._names, copies, strict=True))


def _modes(optimizer: Optimizer) -> Any:
    """Return the optimizer as what it is: torch's own class has no modes."""
    return optimizer
