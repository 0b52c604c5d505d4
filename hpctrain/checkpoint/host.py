"""Copies in host memory, which training need not wait for while they are written."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class HostCopies:
    """Memory that is kept from save to save: fresh memory costs more than the data."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[str, Tensor]] = {}

    def copy(self, group: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return copies of tensors on the host, in the place of those of the same group before."""
        kept = self._kept.get(group, {})
        host = {}
        for name, tensor in tensors.items():
            buffer = kept.get(name)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty(
                    tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda"
                )
            buffer.copy_(tensor.detach(), non_blocking=True)
            host[name] = buffer
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        self._kept[group] = host
        return host
