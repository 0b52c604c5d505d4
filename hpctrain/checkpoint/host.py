"""Copies in host memory, which training need not wait for while they are written."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from threading import Event

import torch
from torch import Tensor

from hpctrain.errors import CheckpointError


class HostCopies:
    """Memory that is kept from save to save: fresh memory costs more than the data."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[str, Tensor]] = {}

    def copy(self, group: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return copies of tensors on the host, in the place of those of the same group before."""
        host = self._buffers(group, tensors)
        for name, tensor in tensors.items():
            host[name].copy_(tensor.detach(), non_blocking=_is_on_cuda(tensor))
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return host

    def copy_later(self, group: str, tensors: Mapping[str, Tensor]) -> LaterCopies:
        """Return copies that are made while training goes on: of tensors that stay as they are."""
        return LaterCopies(tensors, self._buffers(group, tensors))

    def _buffers(self, group: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return memory for copies of tensors, each contiguous."""
        kept = self._kept.get(group, {})
        host = {}
        for name, tensor in tensors.items():
            buffer = kept.get(name)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty(
                    tensor.shape, dtype=tensor.dtype, pin_memory=_is_on_cuda(tensor)
                )
            host[name] = buffer
        self._kept[group] = host
        return host


class LaterCopies:
    """Copies in the making, while the originals stay as they are.

    A CUDA device makes them on a stream of its own, beside its work; of all else the thread that
    calls `make` does.

    Attributes:
        host: by name; whole when `make` has returned.
    """

    def __init__(self, tensors: Mapping[str, Tensor], host: dict[str, Tensor]) -> None:
        self.host = host
        # Held until they are copied, whatever else lets go of them.
        self._originals = {name: tensor.detach() for name, tensor in tensors.items()}
        self._on_device: torch.cuda.Event | None = None
        self._copied = Event()
        queued = [name for name, tensor in tensors.items() if _is_on_cuda(tensor)]
        if queued:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for name in queued:
                    host[name].copy_(self._originals[name], non_blocking=True)
                self._on_device = stream.record_event()

    def make(self) -> None:
        """Make the copies, and wait for those of a CUDA device.

        Raises:
            CheckpointError: if torch cannot.
        """
        try:
            for name, tensor in self._originals.items():
                if not _is_on_cuda(tensor):
                    _copy(self.host[name], tensor)
            self._copied.set()
            if self._on_device is not None:
                self._on_device.synchronize()
        except RuntimeError as error:
            raise CheckpointError(f"cannot copy what is to be saved: {error}") from error
        finally:
            self._copied.set()
            self._originals.clear()

    def wait(self) -> None:
        """Return as soon as the originals may change; what the device is told next waits itself."""
        self._copied.wait()
        if self._on_device is not None:
            torch.cuda.current_stream().wait_event(self._on_device)


def _is_on_cuda(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


def _copy(buffer: Tensor, tensor: Tensor) -> None:
    """Copy to contiguous memory of the host."""
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        # torch would wake as many threads as training computes with at this moment.
        ctypes.memmove(buffer.data_ptr(), tensor.data_ptr(), tensor.numel() * tensor.element_size())
    else:
        buffer.copy_(tensor)
