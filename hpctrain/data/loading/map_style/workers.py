"""Who reads the passes of a Dataset: worker processes, threads, or the rank; such a worker."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from multiprocessing import reduction
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import _utils

from hpctrain.data.arrays import Bytes, Int64s, UInt64s
from hpctrain.data.loading.map_style.fetch import Fetcher, FetchError
from hpctrain.data.loading.map_style.parcel import Packed, Parcel, Spans, packed, unpacked
from hpctrain.data.loading.worker import new_file
from hpctrain.data.loading.worker_pool import WorkerError, WorkerProcess, Workers

LEAST_BYTES = 2**16
"""Of a piece of shared memory; larger ones come in powers of two, to be used again."""


class Travelling(NamedTuple):
    """What goes to the workers of a rank, once.

    Attributes:
        dataset: to read.
        collate: its `collate_fn`; None: torch's.
        worker_init: its `worker_init_fn`; None: there is none.
    """

    dataset: Any
    collate: Callable[[Any], Any] | None
    worker_init: Callable[[int], Any] | None


class Hello(NamedTuple):
    """What a worker is sent first.

    Attributes:
        parcel: of a `Travelling`.
        number: of the worker, from 0; `workers`: how many there are.
        seeded: whether each sample has draws of its own.
        used: generators that samples are known to draw from.
    """

    parcel: Parcel
    number: int
    workers: int
    seeded: bool
    used: tuple[str, ...]


class Handover(NamedTuple):
    """A pass, as it is handed over.

    Attributes:
        payload: as `unpacked` takes it.
        spans: where its values are in memory.
        memory: number of that memory; None: it has no values.
        size: bytes of it, if it is new; its descriptor follows.
        gone: memory that the worker has given back.
    """

    payload: bytes
    spans: Spans
    memory: int | None
    size: int | None
    gone: tuple[int, ...]


def serve(connection: Any) -> None:
    """Read for a rank, until it closes its end."""
    hello: Hello = connection.recv()
    torch.set_num_threads(1)
    try:
        fetcher = _begin(hello)
    except Exception:  # noqa: BLE001 - whatever the user's code raises
        connection.send(traceback.format_exc())
        return
    connection.send(None)
    memories = _Memories()
    while True:
        free, rows, keys = connection.recv()
        memories.free += free
        try:
            made = packed(fetcher.collated(rows, keys))
        except FetchError as error:
            connection.send(error)
        except Exception:  # noqa: BLE001 - what cannot be pickled raises anything
            text = f"a batch cannot be sent to the rank:\n{traceback.format_exc()}"
            connection.send(FetchError(None, text, of_data=False))
        else:
            memories.hand_over(made, connection)


def _begin(hello: Hello) -> Fetcher:
    """Return what reads, once the Dataset is here and knows which worker this is."""
    travelling: Travelling = hello.parcel.opened()
    # Source: torch/utils/data/_utils/worker.py of torch 2.13, what get_worker_info returns.
    _utils.worker._worker_info = _utils.worker.WorkerInfo(
        id=hello.number, num_workers=hello.workers, seed=hello.number, dataset=travelling.dataset
    )
    if travelling.worker_init is not None:
        travelling.worker_init(hello.number)
    return Fetcher(travelling.dataset, travelling.collate, seeded=hello.seeded, used=hello.used)


class _Memories:
    """Shared memory, of which pieces are used again.

    Attributes:
        free: numbers of those that nobody reads any more.
    """

    def __init__(self) -> None:
        self.free: list[int] = []
        self._all: dict[int, Bytes] = {}
        self._made = 0

    def hand_over(self, made: Packed, connection: Any) -> None:
        """Send a pass."""
        spans, size = made.spans()
        if not size:
            connection.send(Handover(made.payload, spans, None, None, ()))
            return
        number = next((each for each in self.free if len(self._all[each]) >= size), None)
        if number is not None:
            self.free.remove(number)
            made.write(self._all[number], spans)
            connection.send(Handover(made.payload, spans, number, None, ()))
            return
        gone, self.free = tuple(self.free), []  # too small, all of them
        for each in gone:
            del self._all[each]
        self._made += 1
        whole = max(LEAST_BYTES, 1 << (size - 1).bit_length())
        descriptor = new_file()
        try:
            os.ftruncate(descriptor, whole)
            memory = np.frombuffer(mmap.mmap(descriptor, whole), np.uint8)
            self._all[self._made] = memory
            made.write(memory, spans)
            connection.send(Handover(made.payload, spans, self._made, whole, gone))
            # The rank waits for it, and knows this process by its connection.
            reduction.send_handle(connection, descriptor, os.getppid())
        finally:
            os.close(descriptor)


_SERVICE = "hpctrain.data.loading.map_style.workers:serve"


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
