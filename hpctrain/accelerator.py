"""What a GPU has and a CPU has not: streams, events, generators and memory of its own.

Everything here is asked of a device that a rank has taken. To ask torch.cuda in general, whether it
is there or for its generator, would open a context on the node's first GPU, also in a run on CPUs,
and in every thread that has not set its device.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

COPIES_ASIDE = ("cuda",)
"""Types of device whose copies were read to run beside the work; AMD's GPUs are cuda as well."""
_OWN_GENERATOR = ("cuda", "xpu")


def module_of(device: torch.device) -> Any:
    """Return torch's module for a type of device, such as torch.cuda."""
    return getattr(torch, device.type)


def enter(device: torch.device) -> None:
    """Make the device the calling thread's own: each thread begins with the first one."""
    if device.type in _OWN_GENERATOR:
        module_of(device).set_device(device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type in _OWN_GENERATOR:
        module_of(device).synchronize(device)


def generator_state(device: torch.device) -> Tensor | None:
    """Return the state of the device's own generator, bytes on the host; None: it has none."""
    if device.type not in _OWN_GENERATOR:
        return None
    state: Tensor = module_of(device).get_rng_state(device)
    return state


def set_generator_state(device: torch.device, state: Tensor) -> None:
    """Put the device's own generator back."""
    module_of(device).set_rng_state(state, device)


def kept_generator(device: torch.device) -> AbstractContextManager[None]:
    """Return a context that leaves torch's generators, the device's too, as they were."""
    if device.type not in _OWN_GENERATOR:
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)


class Streams:
    """The streams of one device: its work, and copies beside it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module = module_of(device)

    def new(self) -> Any:
        """Return another stream. torch has 32 of them for all: make few, and keep them."""
        return self._module.Stream(self.device)

    def current(self) -> Any:
        """Return the stream that the calling thread gives its work to."""
        return self._module.current_stream(self.device)

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Return a context whose work goes to a stream."""
        context: AbstractContextManager[Any] = self._module.stream(stream)
        return context

    def mark(self, stream: Any) -> Any:
        """Return an event behind all that a stream was given; who waits for it takes no core."""
        event = self._module.Event(blocking=True)
        event.record(stream)
        return event

    def pinned(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the host in memory that the device copies from by itself."""
        return tensor.pin_memory()

    def copied(self, tensor: Tensor) -> Tensor:
        """Return a copy on the device, which the current stream makes in its turn."""
        return tensor.to(self.device, non_blocking=True)

    def lend(self, tensor: Tensor, stream: Any) -> None:
        """Keep a tensor's memory from being used again until a stream has done with it."""
        tensor.record_stream(stream)
