"""One function over many files, in processes of this machine, and how far they are."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Protocol, TypeVar

from hpctrain.utils.proc import cpu_budget

T = TypeVar("T")
R = TypeVar("R")


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
