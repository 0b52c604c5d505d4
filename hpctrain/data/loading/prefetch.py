"""Reading ahead (prefetch): a producer thread, and the host memory that it fills."""

from __future__ import annotations

import logging
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

import numpy as np

from hpctrain.data.arrays import Bytes
from hpctrain.data.dataset import Field

logger = logging.getLogger(__name__)

ALIGNMENT_BYTES = 64
"""Of memory that tensors are made of, as torch's own is."""
DEVICE_ALIGNMENT_BYTES = 512
"""Of a batch on a device, as of all that torch allocates there.

cuBLASLt is told alignments up to 256 bytes, and chooses an algorithm by them. Source:
aten/src/ATen/cuda/CUDABlas.cpp of torch 2.13, _getAlignment.
"""
GROUP_BYTES = 16 * 2**20
MOST_GROUP_BATCHES = 1024
"""Small batches are read, and copied to the device, several at a time up to these limits."""
GROUPS_OF_EPOCH = 8
FEW_BATCHES = 64
"""A longer epoch is read in at least so many groups: when a file breaks, some batches are left."""
MOST_PADDED = 1.05
"""Groups follow each other in memory where that makes them at most so many times as long."""
MOST_GROUPS_AHEAD = 4
GROUPS_IN_USE = 3
"""Groups in memory besides those that wait: one filled, one handed over, one consumed."""
GROUPS_IN_USE_BY_COPIES = 4
"""The same where a device copies them: two at once are on their way to it."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How the host memory of reading ahead is spent.

    Attributes:
        windows_fit: whether there is memory for what the windows of all lanes fill ahead.
        group_batches: batches that are read in one go.
        depth: groups that wait for the consumer.
        groups_ready: groups in memory that are whole, or the next to be.
        groups_ahead: groups after those that windows reach into.
        total: bytes of all of it.
    """

    windows_fit: bool
    group_batches: int
    depth: int
    groups_ready: int
    groups_ahead: int
    total: int

    @classmethod
    def make(
        cls,
        share: int,
        buffer_mb: float,
        *,
        batches: int,
        ahead: int = 0,
        ahead_share: int = 0,
        staging: int = 0,
        in_use: int = GROUPS_IN_USE,
    ) -> MemoryPlan:
        """Spend `buffer_mb` MB on what windows fill ahead, then on shares of batches.

        Args:
            share: bytes of this rank's part of a batch.
            buffer_mb: of it all.
            batches: of an epoch.
            ahead: batches that windows reach into after the one that needs them.
            ahead_share: bytes of this rank's part of such a batch.
            staging: bytes that each batch of a group takes besides, before it is one.
            in_use: groups in memory besides those that wait.
        """
        budget = int(buffer_mb * 1e6)
        least = share * (in_use + 1) + staging
        windows = ahead * ahead_share
        fit = windows + least <= budget
        if not fit and windows:
            logger.warning(
                "data.buffer_mb = %g holds no window of every lane (%.0f MB needed): rows are "
                "read one by one, in the same order but slower",
                buffer_mb,
                (windows + least) / 1e6,
            )
            ahead = 0
        if least > budget:
            logger.warning(
                "data.buffer_mb = %g is less than the batches in flight take: %.0f MB",
                buffer_mb,
                least / 1e6,
            )

        def plan(size: int, depth: int) -> MemoryPlan:
            groups = -(-batches // size)
            ready = min(depth + in_use, groups + 1)
            filled = min(-(-ahead // size), groups - 1)
            total = size * (ready * share + filled * ahead_share + staging)
            return cls(fit, size, depth, ready, filled, total)

        most = min(MOST_GROUP_BATCHES, max(FEW_BATCHES, batches // GROUPS_OF_EPOCH), batches)
        wanted = max(1, min(most, GROUP_BYTES // share))
        sizes = (n for n in range(wanted, 1, -1) if plan(n, 1).total <= budget)
        size = next(sizes, 1)
        depths = (n for n in range(MOST_GROUPS_AHEAD, 1, -1) if plan(size, n).total <= budget)
        return plan(size, next(depths, 1))


def new_bytes(size: int) -> Bytes:
    """Return memory of the host, (size,) uint8."""
    # What numpy gives begins at a multiple of 16 bytes.
    memory = np.empty(size + ALIGNMENT_BYTES, np.uint8)
    begin = -memory.ctypes.data % ALIGNMENT_BYTES
    return memory[begin : begin + size]


def power_of_two(size: int) -> int:
    """Return what torch takes of pinned memory for so many bytes.

    Source: aten/src/ATen/core/CachingHostAllocator.h of torch 2.13, allocate.
    """
    return 1 << max(0, size - 1).bit_length()


def slabs_in_powers_of_two(groups: int, group_bytes: int) -> list[int]:
    """Return how many groups to put into each piece of memory, so that all take least."""
    least, first = [0], [0]
    for count in range(1, groups + 1):
        taken, size = min(
            (least[count - size] + power_of_two(size * group_bytes), -size)
            for size in range(1, min(count, _MOST_IN_SLAB) + 1)
        )
        least.append(taken)
        first.append(-size)
    found = []
    while groups:
        found.append(first[groups])
        groups -= first[groups]
    return found


_MOST_IN_SLAB = 16
"""Groups: of more, the search for the best division would take longer than it is worth."""


class BufferPool:
    """Host memory that is used again as soon as nobody refers to it.

    A batch is handed out as a view; when the view and all that was made from it (tensors, what
    autograd saved of them) are gone, its memory comes back. So a consumer may keep a batch as
    long as it likes, and one that does not never pays for fresh pages.
    """

    def __init__(
        self,
        fields: Mapping[str, Field],
        rows: int,
        groups: int,
        allocate: Callable[[int], Bytes],
        *,
        in_powers_of_two: bool = False,
    ) -> None:
        """Keep memory, made by `allocate(bytes)`, that is one piece for each field at first.

        Args:
            fields: that it is for.
            rows: of each field that one group has, at most.
            groups: for which there is room; where more are kept, each has memory of its own.
            allocate: returns (bytes,) uint8 that begins at a multiple of ALIGNMENT_BYTES.
            in_powers_of_two: whether it takes that many bytes, or more up to a power of two: then
                a field has several pieces where that is less in all.
        """
        self._fields = fields
        self._rows = max(1, rows)
        self._free: dict[str, deque[Bytes]] = {name: deque() for name in fields}
        self._left = {
            name: slabs_in_powers_of_two(groups, self._rows * field.row_bytes)
            if in_powers_of_two
            else [groups]
            for name, field in fields.items()
        }
        self._allocate = allocate

    @property
    def surplus_bytes(self) -> int:
        """What the pieces that are still to come take beyond their groups."""
        return sum(
            power_of_two(groups * self._rows * self._fields[name].row_bytes)
            - groups * self._rows * self._fields[name].row_bytes
            for name, left in self._left.items()
            for groups in left
        )

    def take(self, rows: int) -> dict[str, Bytes]:
        """Return memory for so many rows of each field.

        Returns:
            By name, (rows, row_bytes) uint8 that begin at a multiple of ALIGNMENT_BYTES: array
            objects of their own, so that their end can be watched.
        """
        return {name: self._take(name, rows) for name in self._free}

    def _take(self, name: str, rows: int) -> Bytes:
        free = self._free[name]
        try:
            whole = free.pop()
        except IndexError:
            free.extend(self._slab(name))
            whole = free.pop()
        view = whole[:rows]
        weakref.finalize(view, free.append, whole).atexit = False
        return view

    def _slab(self, name: str) -> Iterator[Bytes]:
        """Return new memory in pieces, each for a group."""
        size = self._fields[name].row_bytes
        aligned = ALIGNMENT_BYTES // math.gcd(size, ALIGNMENT_BYTES)
        rows = -(-self._rows // aligned) * aligned
        # Rows added for the sake of alignment are few, or each group has memory of its own.
        left = self._left[name]
        one_by_one = not left or rows > self._rows * MOST_PADDED
        groups = 1 if one_by_one else left.pop(0)
        rows = self._rows if one_by_one else rows
        slab = self._allocate(groups * rows * size).reshape(groups * rows, size)
        return (slab[i * rows : (i + 1) * rows] for i in range(groups))


T = TypeVar("T")


class Prefetch(Generic[T]):
    """Iterates over what `produce()` yields, made by a thread that runs ahead.

    The thread ends when the producer is exhausted or raises, and with `close`, at the end of a
    `with` block, when the object is collected, and at exit. What the producer raises is raised in
    the consumer, after the items that came before it.

    Attributes:
        wait_seconds: how long the consumer has waited for items.
    """

    def __init__(self, produce: Callable[[], Iterator[T]], depth: int) -> None:
        self.wait_seconds = 0.0
        self._channel: _Channel[T] = _Channel(depth)
        # The thread must not refer to this object, or it would never be collected.
        self._thread = threading.Thread(
            target=_run, args=(produce, self._channel), name="hpctrain-reader", daemon=True
        )
        self._finalizer = weakref.finalize(self, _end, self._channel, self._thread)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        begin = time.perf_counter()
        try:
            return self._channel.get()
        finally:
            self.wait_seconds += time.perf_counter() - begin

    def waiting(self) -> T | None:
        """Return the next item if it is there already, else None at once."""
        return self._channel.take()

    def close(self) -> None:
        """End the thread; it finishes at most the item that it is at."""
        self._finalizer()

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Channel(Generic[T]):
    """A bounded queue with an end: either side can close it, and nobody waits for ever.

    The lock of a Condition may be taken again by its holder, so a finalizer that the garbage
    collector runs in the middle of any method here does not hang.
    """

    def __init__(self, depth: int) -> None:
        self._items: deque[T] = deque()
        self._depth = depth
        self._changed = threading.Condition()
        self._closed = False
        self._error: BaseException | None = None

    def put(self, item: T) -> bool:
        """Wait for room and append; False if nobody wants any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._depth)
            if not self._closed:
                self._items.append(item)
                self._changed.notify_all()
            return not self._closed

    def end(self, error: BaseException | None) -> None:
        """Let the consumer take what is there, then stop, or raise `error`."""
        with self._changed:
            self._closed = True
            self._error = error
            self._changed.notify_all()

    def get(self) -> T:
        """Wait for an item and take it; StopIteration or the producer's error at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._items)
            if self._items:
                self._changed.notify_all()
                return self._items.popleft()
            error, self._error = self._error, None
            raise StopIteration if error is None else error

    def take(self) -> T | None:
        """Take an item that is there, None where there is none."""
        with self._changed:
            if not self._items:
                return None
            self._changed.notify_all()
            return self._items.popleft()

    def abandon(self) -> None:
        """Drop everything; the producer ends at its next item."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()


def _run(produce: Callable[[], Iterator[T]], channel: _Channel[T]) -> None:
    try:
        for item in produce():
            if not channel.put(item):
                return
    except BaseException as error:  # noqa: BLE001 - whatever it is, the consumer must hear of it
        channel.end(error)
    else:
        channel.end(None)


def _end(channel: _Channel[T], thread: threading.Thread) -> None:
    channel.abandon()
    # The garbage collector may run this in any thread, also in that one.
    if thread is not threading.current_thread():
        thread.join()
