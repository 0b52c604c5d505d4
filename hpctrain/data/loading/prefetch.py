"""A producer in a thread of its own, a few items ahead of its consumer."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

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
