"""What a step keeps of passes that run as CUDA graphs, whose results lie in the graphs' memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class OwnGradients:
    """Gradients of several passes, added up where no graph writes.

    A graph writes the gradients of every pass to the same memory, and autograd takes the first ones
    as they are: the second pass would add to what it has just overwritten.

    Source: torch/csrc/autograd/functions/accumulate_grad.h, accumulateGrad, and
    torch/_inductor/cudagraph_trees.py of torch 2.13.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        """Begin.

        Args:
            parameters: those that are trained.
        """
        self._parameters = parameters
        self._own: dict[nn.Parameter, Tensor] = {}

    def keep(self) -> None:
        """Move gradients that the pass before has made to memory of their own.

        Those that were moved before, and added to since, stay where they are. Parameters without a
        part in the pass have no gradient, as ever.
        """
        moved = [
            (item, item.grad)
            for item in self._parameters
            if item.grad is not None and item.grad is not self._own.get(item)
        ]
        if not moved:
            return
        for item, gradient in moved:
            if item not in self._own:
                self._own[item] = torch.empty_like(gradient)
        own = [self._own[item] for item, _ in moved]
        torch._foreach_copy_(own, [gradient for _, gradient in moved])
        for (item, _), gradient in zip(moved, own, strict=True):
            item.grad = gradient
