"""The thread that runs ahead: what it delivers, and that it always ends."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest
from helpers.limits import JOB_SECONDS

from hpctrain.data.loading.prefetch import Prefetch


def reader_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "hpctrain-reader"]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    gc.collect()
    assert reader_threads() == []


@pytest.mark.parametrize("depth", [1, 3])
def test_items_come_in_order(depth: int) -> None:
    assert list(Prefetch(lambda: iter(range(100)), depth)) == list(range(100))


def test_runs_no_further_ahead_than_asked() -> None:
    made: list[int] = []
    step = threading.Semaphore(0)

    def produce() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            step.release()
            yield i

    with Prefetch(produce, depth=2) as items:
        # Two wait, a third is made and finds no room.
        for _ in range(3):
            assert step.acquire(timeout=JOB_SECONDS)
        assert not step.acquire(timeout=0.05)
        assert next(items) == 0
        assert step.acquire(timeout=JOB_SECONDS)
        assert made == [0, 1, 2, 3]


def test_error_comes_after_the_items_before_it() -> None:
    def produce() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    items = Prefetch(produce, 4)
    assert next(items) == 1
    with pytest.raises(ValueError, match="broken"):
        next(items)
    assert list(items) == []


def test_close_in_the_middle_and_again() -> None:
    items = Prefetch(lambda: iter(range(100)), 2)
    assert next(items) == 0
    items.close()
    items.close()
    assert list(items) == []


def test_abandoned_object_ends_its_thread() -> None:
    items = Prefetch(lambda: iter(range(100)), 2)
    assert next(items) == 0
    assert len(reader_threads()) == 1
    del items


def test_abandoned_in_a_cycle() -> None:
    cycle: list[object] = [Prefetch(lambda: iter(range(100)), 2)]
    cycle.append(cycle)
    del cycle


def test_producer_is_closed_with_the_consumer() -> None:
    closed = threading.Event()

    def produce() -> Iterator[int]:
        try:
            while True:
                yield 0
        finally:
            closed.set()

    with Prefetch(produce, 1) as items:
        next(items)
    assert closed.wait(timeout=JOB_SECONDS)
