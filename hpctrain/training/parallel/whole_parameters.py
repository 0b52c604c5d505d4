"""Parameters that every rank has, of a model whose other parameters are sharded over the ranks."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch import distributed as dist

from hpctrain.training.model.precision import real_view
from hpctrain.utils.text import listed

logger = logging.getLogger("hpctrain")


def common_dtype(model: nn.Module) -> torch.dtype:
    """Return the real dtype that most numbers of the trained parameters have.

    FSDP gathers and reduces parameters of one dtype together, and no complex ones.
    """
    sizes = Counter[torch.dtype]()
    for item in model.parameters():
        if item.is_floating_point():
            sizes[item.dtype] += item.numel() * item.requires_grad
    return sizes.most_common(1)[0][0] if sizes else torch.float32


class WholeParameters:
    """Parameters that every rank has and updates, as with ddp.

    Numbers without rows, such as a temperature, those of another dtype than most have, and those
    that forward passes change, such as a teacher's.

    Attributes:
        named: by name.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, world_size: int, moved: Sequence[str] = ()
    ) -> None:
        """Put them on the device.

        Args:
            model: whose parameters, equal on all ranks.
            device: of this rank.
            world_size: number of ranks.
            moved: names of those that forward passes change.
        """
        common = common_dtype(model)
        self.named = {
            name: item
            for name, item in model.named_parameters()
            if name in moved
            or not item.ndim
            or item.is_complex()
            or (item.is_floating_point() and item.dtype != common)
        }
        for item in self.named.values():
            item.data = item.data.to(device)
        self._world_size = world_size

    def report(self) -> None:
        """Say which of them could have been spread, were they like most."""
        found = {name: item for name, item in self.named.items() if item.ndim}
        if found:
            logger.warning(
                "fsdp: every rank holds all of %s (%.1f MB): complex, of another dtype than most, "
                "or changed by forward passes",
                listed(list(found)),
                sum(item.numel() * item.element_size() for item in found.values()) / 1e6,
            )

    def clear_gradients(self) -> None:
        """Forget their gradients."""
        for item in self.named.values():
            item.grad = None

    def reduce(self) -> None:
        """Average their gradients, of which a missing one is 0, in a message for each dtype.

        Collective: all ranks.
        """
        messages: dict[torch.dtype, list[nn.Parameter]] = {}
        for item in self.named.values():
            if item.requires_grad:
                messages.setdefault(_sent_as(item), []).append(item)
        for dtype, items in messages.items():
            gradients = [
                torch.zeros_like(item) if item.grad is None else item.grad for item in items
            ]
            parts = [real_view(item.resolve_conj()).reshape(-1) for item in gradients]
            message = torch.cat([part.to(dtype) for part in parts])
            dist.all_reduce(message)
            means = (message / self._world_size).split([part.numel() for part in parts])
            for item, mean in zip(items, means, strict=True):
                item.grad = torch.empty_like(item)
                real_view(item.grad).copy_(mean.view(real_view(item.grad).shape))


def _sent_as(item: Tensor) -> torch.dtype:
    """Return the dtype in which a gradient is summed; single numbers cost no more in float64."""
    wide = not item.ndim or item.dtype.to_real() == torch.float64
    return torch.float64 if wide else torch.float32
