"""Threads that share one job, their memory, and read-ahead of the system."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from hpctrain.utils.proc import allowed_cores, cpu_quotas

MOST_THREADS = 4
"""Of one reader, where nothing else is asked for: memory, not the cores, is the limit by then."""
LEAST_SHARED_BYTES = 2**19
"""Less than this is not worth waking another thread for."""
WARM_BYTES_PER_SECOND = 2e9
"""Faster than this per thread, the data come from the page cache: to announce them is in vain."""

T = TypeVar("T")


def reading_threads(local_world_size: int) -> int:
    """Return how many threads a rank reads with, where nothing else is asked for.

    A launcher that pins has chosen the rank's cores; ranks that may use all of them divide them.
    """
    cores = os.cpu_count() or 1
    # A quota is mostly that of all ranks on the node together.
    quota = min((quota.cpus for quota in cpu_quotas()), default=float(cores))
    shared = int(min(cores, quota)) // local_world_size
    return max(1, min(len(allowed_cores()), shared, MOST_THREADS))


class Helpers:
    """Threads that do one job at a time. They start with the first job that needs them.

    What they do must let go of Python's lock, as system calls, decompression and copies do.

    Attributes:
        size: threads, the caller included.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._pool: ThreadPoolExecutor | None = None

    def each(self, do: Callable[[T], None], items: Sequence[T]) -> None:
        """Do every item, in no order; return when all are done.

        Raises:
            BaseException: what one of them raised, when the others have stopped.
        """
        left = iter(items)
        count = min(self.size, len(items)) - 1
        if count < 1:
            _work(do, left)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.size - 1, "hpctrain-read")
        futures = [self._pool.submit(_work, do, left) for _ in range(count)]
        try:
            _work(do, left)
        finally:
            for _ in left:  # after an error nobody begins another item
                pass
            errors = [future.exception() for future in futures]
        for error in errors:
            if error is not None:
                raise error

    def close(self) -> None:
        """End the threads. The next job starts them again."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


class ThreadMemory:
    """Memory of each thread, used again for whatever it does next: fresh memory costs more."""

    def __init__(self) -> None:
        self._local = threading.local()

    def take(self, size: int) -> npt.NDArray[np.uint8]:
        """Return the calling thread's memory, (size,) uint8; what it holds stays if it fits."""
        kept: npt.NDArray[np.uint8] | None = getattr(self._local, "memory", None)
        if kept is None or len(kept) < size:
            kept = self._local.memory = np.empty(size, np.uint8)
        return kept[:size]


def _work(do: Callable[[T], None], left: Iterator[T]) -> None:
    # Threads may share the iterator of a sequence: Python's lock is held while it moves on.
    for item in left:
        do(item)


def parts(count: int, threads: int) -> list[slice]:
    """Cut so many items into runs of about equal length, one a thread."""
    bounds = [count * i // threads for i in range(threads + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(bounds) if b > a]


class Coldness:
    """Whether what was read last came from the disk.

    Attributes:
        is_cold: the judgement; at first, yes.
    """

    def __init__(self) -> None:
        self.is_cold = True

    def judge(self, num_bytes: int, seconds: float) -> None:
        """Judge by reads of so many bytes that took so long, summed over threads."""
        if num_bytes >= LEAST_SHARED_BYTES:  # less takes its time for other reasons
            self.is_cold = num_bytes < WARM_BYTES_PER_SECOND * seconds


def announce(descriptor: int, offset: int, size: int) -> None:
    """Advise the system that these bytes are wanted soon, so that it reads them meanwhile."""
    with suppress(OSError):  # advice: a file system may refuse it
        os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_WILLNEED)
