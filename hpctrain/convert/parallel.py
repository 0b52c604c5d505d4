"""One function over many files, in processes of this machine; and the values of one of them."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from hpctrain.data.dataset import Dataset, Field, Shard
from hpctrain.data.decoding import FieldDecoding
from hpctrain.data.reading.rows import open_rows
from hpctrain.utils.proc import cpu_budget

T = TypeVar("T")
R = TypeVar("R")
BLOCK_BYTES = 4 * 2**20
LARGEST_BLOCK_BYTES = 256 * 2**20
"""Of a block that is one chunk."""


class Progress(Protocol):
    """Is told how much of the work is done; the command line draws a bar of it."""

    def __call__(self, done: int, total: int) -> object:
        """Note that `done` of `total` are done, in whatever unit."""
        ...


def silent(done: int, total: int) -> None:
    """Show nothing."""


def processors() -> int:
    """Return how many processors this process may use at once."""
    return cpu_budget()


def for_each(
    function: Callable[[T], R],
    items: Sequence[T],
    jobs: int,
    progress: Progress,
    crashed: Callable[[T, BrokenProcessPool], R],
) -> list[R]:
    """Return what a function makes of every item, in their order.

    Args:
        function: importable by its name, without state.
        items: small; they are pickled.
        jobs: processes at the same time; 0: one a processor.
        progress: is told how many items are done.
        crashed: returns what stands for an item on which the process crashed, or raises.
    """
    found: dict[int, R] = {}
    progress(0, len(items))
    for index, result in each(function, items, jobs or processors()):
        if isinstance(result, BrokenProcessPool):
            found[index] = crashed(items[index], result)
        else:
            found[index] = result
        progress(len(found), len(items))
    return [found[index] for index in range(len(items))]


def each(
    function: Callable[[T], R], items: Sequence[T], jobs: int
) -> Iterator[tuple[int, R | BrokenProcessPool]]:
    """Yield the index of every item and what the function makes of it, as they get ready.

    HDF5 holds one lock over all threads of a process, so only processes decompress side by side.
    A damaged file can even crash it: then that item has a BrokenProcessPool for a result, and the
    others are none the worse. With one job there are no further processes, and no such help.

    Args:
        function: importable by its name, without state.
        items: small; they are pickled.
        jobs: processes at the same time.
    """
    if jobs == 1 or not items:
        yield from enumerate(map(function, items))
        return
    left = set(range(len(items)))
    try:
        for index, result in _in_pool(function, items, sorted(left), min(jobs, len(items))):
            left.remove(index)
            yield index, result
    except BrokenProcessPool:
        # Nobody knows which item it was: what is left goes one by one.
        for index in sorted(left):
            try:
                yield from _in_pool(function, items, [index], 1)
            except BrokenProcessPool as error:
                yield index, error


def _in_pool(
    function: Callable[[T], R], items: Sequence[T], indices: Sequence[int], jobs: int
) -> Iterator[tuple[int, R]]:
    # A forked child would inherit the threads' locks as they are; a fork server has no threads.
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_end_silently) as pool:
        running: dict[Future[R], int] = {pool.submit(function, items[i]): i for i in indices}
        try:
            while running:
                ready, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in ready:
                    yield running.pop(future), future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _end_silently() -> None:
    """Have an interrupt at a terminal, which goes to all processes, end this one silently."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def one_shard(shard: Shard, fields: dict[str, Field]) -> Dataset:
    """Return a dataset of one shard."""
    return Dataset(shard.path, fields, (shard,))


def blocks_of(dataset: Dataset, name: str) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """Yield the number of the first row of every block of a field, and its values.

    The values are (rows, *shape) in this machine's byte order, in memory that is used again for
    the next block.

    Raises:
        DatasetError: naming file, field and row that cannot be read.
    """
    field = dataset.fields[name]
    rows = _rows_of_block(field.row_bytes, max(s.layouts[name].chunk_rows for s in dataset.shards))
    buffer = np.empty((min(rows, dataset.samples), field.row_bytes), np.uint8)
    with closing(open_rows(dataset, retries=0)) as access:
        for start in range(0, dataset.samples, rows):
            part = buffer[: min(rows, dataset.samples - start)]
            access.read_runs(name, np.array([start]), np.array([len(part)]), part, np.array([0]))
            values = part.view(field.dtype.newbyteorder("="))
            yield start, values.reshape(len(part), *field.shape)


def decoded_blocks_of(
    dataset: Dataset, name: str, decoding: FieldDecoding | None
) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """Yield the blocks of a field as `blocks_of` does, decoded."""
    for start, numbers in blocks_of(dataset, name):
        if decoding is None:
            yield start, numbers
        else:
            codes = decoding.codes(np.arange(start, start + len(numbers)))
            yield start, decoding.decode(numbers, codes)


def _rows_of_block(row_bytes: int, chunk_rows: int) -> int:
    """Return how many rows to read at once; chunks are not cut, to be decompressed only once."""
    rows = max(1, BLOCK_BYTES // row_bytes)
    if chunk_rows <= rows:
        return rows - rows % chunk_rows
    return chunk_rows if chunk_rows * row_bytes <= LARGEST_BLOCK_BYTES else rows
