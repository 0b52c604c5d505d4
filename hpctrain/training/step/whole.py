"""Parameters without dimensions, of a model whose other parameters are spread over the ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch import distributed as dist


class WholeParameters:
    """Numbers such as a temperature: they have no rows, so that every rank has and updates them.

    Attributes:
        named: by name.
    """

    def __init__(self, model: nn.Module, device: torch.device, world_size: int) -> None:
        """Put them on the device.

        Args:
            model: whose parameters, equal on all ranks.
            device: of this rank.
            world_size: number of ranks.
        """
        self.named = {name: item for name, item in model.named_parameters() if not item.ndim}
        for item in self.named.values():
            item.data = item.data.to(device)
        self._world_size = world_size

    def clear_gradients(self) -> None:
        """Forget their gradients."""
        for item in self.named.values():
            item.grad = None

    def reduce(self) -> None:
        """Average their gradients, of which a missing one is 0, in one message.

        Collective: all ranks.
        """
        trained = [item for item in self.named.values() if item.requires_grad]
        if not trained:
            return
        wide = torch.complex128 if any(item.is_complex() for item in trained) else torch.float64
        gradients = torch.stack(
            [
                torch.zeros_like(item, dtype=wide) if item.grad is None else item.grad.to(wide)
                for item in trained
            ]
        )
        dist.all_reduce(torch.view_as_real(gradients) if wide.is_complex else gradients)
        for item, mean in zip(trained, (gradients / self._world_size).unbind(), strict=True):
            item.grad = _as(mean, item.dtype)


def _as(mean: Tensor, dtype: torch.dtype) -> Tensor:
    return (mean if dtype.is_complex else mean.real).to(dtype)
