"""Copies of groups of batches to a device, on a stream beside its work."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hpctrain.accelerator import COPIES_ASIDE, Streams
from hpctrain.data.arrays import Bytes
from hpctrain.data.loading.prefetch import GROUPS_IN_USE, GROUPS_IN_USE_BY_COPIES

MOST_COPIES = 2
"""Groups on their way to the device at once."""


def groups_in_use(device: torch.device) -> int:
    """Return how many groups are in host memory besides those that wait for the consumer."""
    return GROUPS_IN_USE_BY_COPIES if device.type in COPIES_ASIDE else GROUPS_IN_USE


def pinned_bytes(size: int) -> Bytes:
    """Return memory that the device copies from while the host goes on."""
    array: Bytes = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
    return array


class Copying:
    """The tensors of one group on their way to the device, or there."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._tensors: list[torch.Tensor] = []
        self._stream: Any = None
        self.done: Any = None

    def copy(self, tensor: torch.Tensor, *, pinned: bool) -> torch.Tensor:
        """Return a copy in the making of a tensor of the host.

        Args:
            tensor: on the host.
            pinned: whether the device copies from its memory by itself; else it is put into such
                memory first, which suits small ones.
        """
        here = tensor if pinned else self._streams.pinned(tensor)
        self._tensors.append(copied := self._streams.copied(here))
        return copied

    def require(self) -> None:
        """Have what the caller gives to its current stream from now on wait for the copies.

        The host does not wait.
        """
        stream = self._streams.current()
        if stream == self._stream:
            return
        # The consumer may change its stream in the middle of a group.
        stream.wait_event(self.done)
        for tensor in self._tensors:
            # Made on another stream, whose next copy would else take this memory too early.
            self._streams.lend(tensor, stream)
        self._stream = stream


class DeviceCopies:
    """Makes copies on a stream of its own, and keeps the host's memory until they are made."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._aside: Any = None  # made with the first copy, in the consumer's thread
        # Copies that may be under way, and the host memory that they read.
        self._running: deque[tuple[Any, object]] = deque()

    @contextmanager
    def of(self, source: object) -> Iterator[Copying]:
        """Give what copies a group; returns at once, unless two groups are under way already.

        Args:
            source: what keeps the memory of pinned tensors from being used again; let go of when
                the copies are made.
        """
        running = self._running
        while running and (len(running) >= MOST_COPIES or running[0][0].query()):
            # Without a bound a host that runs ahead of its device would take ever more memory.
            running.popleft()[0].synchronize()
        if self._aside is None:
            self._aside = self._streams.new()
        copying = Copying(self._streams)
        with self._streams.on(self._aside):
            yield copying
            copying.done = self._streams.mark(self._aside)
        running.append((copying.done, source))
