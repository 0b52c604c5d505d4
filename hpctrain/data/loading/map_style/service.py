"""A worker process that reads a Dataset for its rank, a pass at a time.

What it hands over lies in memory that both share: files without a name, of which it has as many as
the rank holds passes. The rank says which of them nobody needs any more.
"""

from __future__ import annotations

import mmap
import os
import traceback
from collections.abc import Callable
from multiprocessing import reduction
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import _utils

from hpctrain.data.arrays import Bytes
from hpctrain.data.loading.map_style.fetch import Fetcher, FetchError
from hpctrain.data.loading.map_style.parcel import Packed, Parcel, Spans, packed
from hpctrain.data.loading.worker import new_file

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
