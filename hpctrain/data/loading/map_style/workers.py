"""Who reads the passes of a Dataset: worker processes, threads, or the rank itself."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import weakref
from collections import deque
from collections.abc import Mapping
from multiprocessing import reduction
from typing import Any, NamedTuple

import numpy as np

from hpctrain.data.arrays import Bytes, Int64s, UInt64s
from hpctrain.data.loading.map_style.fetch import Fetcher, FetchError
from hpctrain.data.loading.map_style.parcel import Parcel, unpacked
from hpctrain.data.loading.map_style.service import Handover, Hello
from hpctrain.data.loading.worker_pool import Workers
from hpctrain.data.loading.worker_process import WorkerError, WorkerProcess

_SERVICE = "hpctrain.data.loading.map_style.service:serve"


class PassJob(NamedTuple):
    """A pass to read.

    Attributes:
        rows: (count,) int64; none: only have the worker be there.
        keys: (count,) uint64, what each sample draws from.
    """

    rows: Int64s
    keys: UInt64s


class FetchThread:
    """Reads in the thread that it is called from."""

    def __init__(self, fetcher: Fetcher) -> None:
        self._fetcher = fetcher

    def run(self, job: PassJob) -> Any:
        return self._fetcher.collated(job.rows, job.keys)

    def close(self) -> None:
        pass


class FetchProcess:
    """Has a process of its own read, started with the first job.

    Several threads may give it jobs, so that the next one is there when one is done; it answers
    them in their order.
    """

    def __init__(self, source: str, hello: Hello, environment: Mapping[str, str]) -> None:
        """Prepare.

        Args:
            source: what the user calls the Dataset.
            hello: what the process is to know.
            environment: of the process.
        """
        self._worker = f"worker {hello.number} of {source}"
        self._process = WorkerProcess(
            f"{source}: the rank could send it", _SERVICE, hello, environment, [hello.parcel[1]]
        )
        self._memories: dict[int, Bytes] = {}
        self._free: deque[int] = deque()
        self._asking = threading.Lock()
        self._answered = threading.Condition()
        self._asked = self._told = 0
        self._ended: WorkerError | None = None

    def run(self, job: PassJob) -> Any:
        try:
            turn = self._ask(job)
            if turn is None:
                return None
            with self._answered:
                self._answered.wait_for(lambda: self._told == turn)
            try:
                answer = self._answer()
            finally:
                with self._answered:
                    self._told += 1
                    self._answered.notify_all()
        except (EOFError, OSError) as error:
            raise self._failed() from error
        if isinstance(answer, FetchError):
            raise answer
        return answer

    def close(self) -> None:
        self._process.close()
        self._memories.clear()
        self._free = deque()
        self._asked = self._told = 0
        self._ended = None

    def _failed(self) -> WorkerError:
        """Return how the process has ended, to every thread that waited for it the same."""
        with self._asking:
            if self._ended is None:
                self._ended = WorkerError(self._process.exit_message(self._worker, "a Dataset"))
                self._process.close()
            return self._ended

    def _ask(self, job: PassJob) -> int | None:
        """Hand a job over, and return when its answer comes; None: there is none to a start."""
        with self._asking:
            if self._ended is not None:
                raise self._ended
            self._process.start()
            if not len(job.rows):
                return None
            free = self._free
            freed = [free.popleft() for _ in range(len(free))]
            self._process.connection.send((freed, job.rows, job.keys))
            self._asked += 1
            return self._asked - 1

    def _answer(self) -> Any:
        connection, free = self._process.connection, self._free
        if connection is None:
            raise EOFError
        answer: Handover | FetchError = connection.recv()
        if isinstance(answer, FetchError):
            return answer
        for number in answer.gone:
            del self._memories[number]
        if answer.memory is None:
            return unpacked(answer.payload, b"", answer.spans)
        if answer.size is not None:
            descriptor = reduction.recv_handle(connection)
            try:
                mapped = mmap.mmap(descriptor, answer.size)
            finally:
                os.close(descriptor)
            self._memories[answer.memory] = np.frombuffer(mapped, np.uint8)
        # An array object of its own, whose end can be watched: tensors keep it.
        memory = self._memories[answer.memory][:]
        weakref.finalize(memory, free.append, answer.memory).atexit = False
        return unpacked(answer.payload, memory, answer.spans)


def processes(
    source: str,
    parcel: Parcel,
    workers: int,
    environment: Mapping[str, str],
    *,
    seeded: bool,
    used: tuple[str, ...],
) -> Workers[PassJob, Any]:
    """Return so many processes that read a Dataset, and begin to start them.

    Args:
        source: what the user calls it.
        parcel: that holds it, of a `Travelling`.
        workers: how many.
        environment: of the processes.
        seeded: whether each sample has draws of its own.
        used: generators that samples are known to draw from.
    """
    found = [
        FetchProcess(source, Hello(parcel, number, workers, seeded, used), environment)
        for number in range(workers)
    ]
    # Each with two jobs at a time: one that it is at, and one that waits for it.
    pool: Workers[PassJob, Any] = Workers([*found, *found])
    weakref.finalize(pool, _close, parcel.descriptor).atexit = False
    # They load torch while the model is built.
    nothing = PassJob(np.empty(0, np.int64), np.empty(0, np.uint64))
    for _ in found:
        pool.submit(nothing)
    return pool


def _close(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        os.close(descriptor)
