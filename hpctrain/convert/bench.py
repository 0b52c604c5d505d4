"""How fast this file system is, and how much of it hpctrain delivers from this dataset.

Measured in turns: the files read from end to end into one buffer, then the dataset as training
reads it, shuffled, up to whole batches in host memory.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

from hpctrain.convert.parallel import Progress, silent
from hpctrain.data.arrays import Bytes
from hpctrain.data.dataset import Dataset
from hpctrain.data.loading.prefetch import BufferPool, MemoryPlan, Prefetch, new_bytes
from hpctrain.data.loading.sources import BlockSource, Group, RowSource, Source
from hpctrain.data.order.epochs import Epoch
from hpctrain.data.order.order import Order
from hpctrain.data.order.read_ahead import LaneWindows, RowStream
from hpctrain.data.reading.rows import open_rows
from hpctrain.data.reading.scatter import RowReader
from hpctrain.data.reading.threads import Helpers
from hpctrain.errors import DatasetError
from hpctrain.utils.files import open_regular

WINDOW_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What was measured; medians over the rounds.

    Attributes:
        raw_mb_per_second: of the files, in windows of WINDOW_BYTES, by one thread.
        delivered_mb_per_second: of values, in shuffled batches.
        samples_per_second: the same in samples.
        files_opened: while the dataset was delivered, a round.
        is_cold: whether the page cache was asked to forget the files before every turn.
    """

    raw_mb_per_second: float
    delivered_mb_per_second: float
    samples_per_second: float
    files_opened: int
    is_cold: bool

    @property
    def ratio(self) -> float:
        return self.delivered_mb_per_second / self.raw_mb_per_second

    def __str__(self) -> str:
        cache = "asked to be empty" if self.is_cold else "as it was"
        return (
            f"raw {self.raw_mb_per_second:,.0f} MB/s, delivered "
            f"{self.delivered_mb_per_second:,.0f} MB/s "
            f"({self.samples_per_second:,.0f} samples/s): {self.ratio:.2f} of raw; "
            f"{self.files_opened} files opened; page cache {cache}"
        )


def bench(
    dataset: Dataset,
    *,
    global_batch_size: int,
    seconds: float,
    rounds: int = 3,
    cold: bool = False,
    buffer_mb: float = 512.0,
    threads: int = 1,
    progress: Progress = silent,
) -> Speed:
    """Measure.

    Args:
        dataset: as opened.
        global_batch_size: samples of one batch.
        seconds: of one turn; a turn also ends with the data.
        rounds: of two turns.
        cold: ask the page cache to forget the files before every turn.
        buffer_mb: as `data.buffer_mb`.
        threads: as `data.threads`.
        progress: is told how many turns are done.

    Raises:
        DatasetError: if a file cannot be read, or the batch is larger than the dataset.
    """
    if global_batch_size > dataset.samples:
        raise DatasetError(
            f"a batch of {global_batch_size}, but {dataset.source} has only {dataset.samples} "
            f"samples: --batch {dataset.samples} at most"
        )
    raw: list[float] = []
    delivered: list[float] = []
    opened = 0
    for turn in range(rounds):
        progress(2 * turn, 2 * rounds)
        if cold:
            forget(dataset)
        raw.append(raw_speed(dataset, seconds))
        progress(2 * turn + 1, 2 * rounds)
        if cold:
            forget(dataset)
        speed, opened = delivered_speed(
            dataset, turn, global_batch_size, seconds, buffer_mb, threads
        )
        delivered.append(speed)
    progress(2 * rounds, 2 * rounds)
    median = statistics.median(delivered)
    return Speed(
        raw_mb_per_second=statistics.median(raw) / 1e6,
        delivered_mb_per_second=median * dataset.bytes_per_sample / 1e6,
        samples_per_second=median,
        files_opened=opened,
        is_cold=cold,
    )


def forget(dataset: Dataset) -> None:
    """Ask the page cache to forget the files; of those just written, it keeps what is not synced.

    Raises:
        DatasetError: if one cannot be opened.
    """
    for shard in dataset.shards:
        descriptor = _open(shard.path)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def raw_speed(dataset: Dataset, seconds: float) -> float:
    """Return bytes a second of reading the files from end to end, for so long at most.

    Raises:
        DatasetError: if one cannot be read.
    """
    window = memoryview(bytearray(WINDOW_BYTES))
    done = 0
    begin = time.perf_counter()
    for shard in dataset.shards:
        descriptor = _open(shard.path)
        try:
            place = 0
            while count := os.preadv(descriptor, [window], place):
                place += count
                done += count
                if time.perf_counter() - begin > seconds:
                    break
        except OSError as error:
            raise DatasetError(f"{shard.path}: {error.strerror}") from error
        finally:
            os.close(descriptor)
        if time.perf_counter() - begin > seconds:
            break
    return done / (time.perf_counter() - begin)


def delivered_speed(
    dataset: Dataset,
    epoch: int,
    global_batch_size: int,
    seconds: float,
    buffer_mb: float,
    threads: int,
) -> tuple[float, int]:
    """Return samples a second of one process in training's order, and how many files it opened.

    Raises:
        DatasetError: if a file cannot be read.
    """
    order = Order.for_dataset(dataset, seed=0, global_batch_size=global_batch_size)
    share = global_batch_size * dataset.bytes_per_sample
    ahead = order.batches_ahead(global_batch_size)
    batches = -(-order.samples // global_batch_size)
    memory = MemoryPlan.make(share, buffer_mb, batches=batches, ahead=ahead, ahead_share=share)
    rows = global_batch_size * memory.group_batches
    pool = BufferPool(dataset.fields, rows, memory.groups_ready + memory.groups_ahead, _touched)
    done = 0
    helpers = Helpers(threads)
    with closing(open_rows(dataset, helpers=helpers)) as access:
        source = _source(order, epoch, access, windows_fit=memory.windows_fit)
        groups = _groups(order, rows)
        produce = functools.partial(source.read, groups, pool)
        pool.take(0)  # all memory is made, and touched, before the time begins
        begin = time.perf_counter()
        with Prefetch(produce, memory.depth) as running:
            for host in running:
                done += len(host.group.positions)
                if time.perf_counter() - begin > seconds:
                    break
        elapsed = time.perf_counter() - begin
        return done / elapsed, access.files_opened


def _source(order: Order, epoch: int, access: RowReader, *, windows_fit: bool) -> Source:
    plan = Epoch(order, epoch)
    if order.block_rows == 1:
        return RowSource(access, plan.rows)
    windows = LaneWindows(plan, 0, 1, 0, order.samples)
    if not windows_fit:
        return RowSource(access, RowStream(windows).next)
    return BlockSource(access, windows)


def _groups(order: Order, rows: int) -> Iterator[Group]:
    for start in range(0, order.samples, rows):
        stop = min(start + rows, order.samples)
        yield Group([start, stop], order.positions(start, stop, 0, 1))


def _touched(size: int) -> Bytes:
    """Return memory whose pages are there: a training run has paid for them long before."""
    memory = new_bytes(size)
    memory.fill(0)
    return memory


def _open(path: str) -> int:
    try:
        return open_regular(path)
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror}") from error
