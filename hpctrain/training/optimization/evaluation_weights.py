"""Weights to evaluate with, of optimizers that have train() and eval() since they train others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hpctrain.checkpoint.state import HasParameters


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
