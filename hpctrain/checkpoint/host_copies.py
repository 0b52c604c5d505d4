"""Copies in host memory, which training need not wait for while they are written."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any

import torch
from torch import Tensor

from hpctrain.accelerator import COPIES_ASIDE, Streams, enter
from hpctrain.errors import CheckpointError


def pinned_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of host memory that copies of a device's tensors take: powers of two.

    Source: aten/src/ATen/core/CachingHostAllocator.h of torch 2.13, allocate.
    """
    sizes = [item.numel() * item.element_size() for item in tensors if _is_copied_aside(item)]
    return sum(1 << max(0, size - 1).bit_length() for size in sizes)


class HostCopies:
    """Memory that is kept from save to save: fresh memory costs more than the data."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[str, Tensor]] = {}
        self._aside: dict[torch.device, _Aside] = {}

    def copy(self, group: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return copies of tensors on the host, in the place of those of the same group before."""
        host = self._buffers(group, tensors)
        for name, tensor in tensors.items():
            host[name].copy_(tensor.detach(), non_blocking=_is_copied_aside(tensor))
        for device in {item.device for item in tensors.values() if _is_copied_aside(item)}:
            streams = Streams(device)
            streams.mark(streams.current()).synchronize()
        return host

    def copy_later(self, group: str, tensors: Mapping[str, Tensor]) -> LaterCopies:
        """Return copies that are made while training goes on: of tensors that stay as they are."""
        devices = {item.device for item in tensors.values() if _is_copied_aside(item)}
        aside = [self._aside_of(device) for device in devices]
        return LaterCopies(tensors, self._buffers(group, tensors), aside)

    def _aside_of(self, device: torch.device) -> _Aside:
        if device not in self._aside:
            streams = Streams(device)
            self._aside[device] = _Aside(streams, streams.new())
        return self._aside[device]

    def _buffers(self, group: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return memory for copies of tensors, each contiguous."""
        kept = self._kept.get(group, {})
        host = {}
        for name, tensor in tensors.items():
            buffer = kept.get(name)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty(
                    tensor.shape, dtype=tensor.dtype, pin_memory=_is_copied_aside(tensor)
                )
            host[name] = buffer
        self._kept[group] = host
        return host


@dataclass(frozen=True, slots=True)
class _Aside:
    """A device, and the one stream on which copies for all saves are made beside its work."""

    streams: Streams
    stream: Any


class LaterCopies:
    """Copies in the making, while the originals stay as they are.

    A CUDA device makes them on a stream of its own, beside its work; of all else the thread that
    calls `make` does.

    Attributes:
        host: copies by name; whole when `make` has returned.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], host: dict[str, Tensor], aside: Sequence[_Aside] = ()
    ) -> None:
        self.host = host
        # Held until they are copied, whatever else lets go of them.
        self._originals = {name: tensor.detach() for name, tensor in tensors.items()}
        self._copied = Event()
        self._on_device: list[tuple[Streams, Any]] = []
        for each in aside:
            streams, stream = each.streams, each.stream
            stream.wait_stream(streams.current())
            with streams.on(stream):
                for name, tensor in self._originals.items():
                    if tensor.device == streams.device:
                        host[name].copy_(tensor, non_blocking=True)
            self._on_device.append((streams, streams.mark(stream)))

    def make(self) -> None:
        """Make the copies, and wait for those of a CUDA device.

        Raises:
            CheckpointError: if torch cannot.
        """
        try:
            for name, tensor in self._originals.items():
                if not _is_copied_aside(tensor):
                    _copy(self.host[name], tensor)
            self._copied.set()
            for streams, done in self._on_device:
                enter(streams.device)  # a thread that waits for a device opens a context on its own
                done.synchronize()
        except RuntimeError as error:
            raise CheckpointError(f"cannot copy what is to be saved: {error}") from error
        finally:
            self._copied.set()
            self._originals.clear()

    def wait(self) -> None:
        """Return once the originals may change; the device's next kernels wait by themselves."""
        self._copied.wait()
        for streams, done in self._on_device:
            streams.current().wait_event(done)


def _is_copied_aside(tensor: Tensor) -> bool:
    return tensor.device.type in COPIES_ASIDE


def _copy(buffer: Tensor, tensor: Tensor) -> None:
    """Copy to contiguous memory of the host."""
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        # torch would wake as many threads as training computes with at this moment.
        ctypes.memmove(buffer.data_ptr(), tensor.data_ptr(), tensor.numel() * tensor.element_size())
    else:
        buffer.copy_(tensor)
