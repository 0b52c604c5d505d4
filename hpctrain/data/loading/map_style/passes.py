"""Passes of a Dataset, read ahead of the steps, and on their way to the device beside them."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from hpctrain.accelerator import COPIES_ASIDE, Streams, enter
from hpctrain.data.arrays import Int64s, UInt64s
from hpctrain.data.loading.batch import cut, map_tensors, moved
from hpctrain.data.loading.device_copies import DeviceCopies
from hpctrain.data.loading.map_style.dataset import MapDataset
from hpctrain.data.loading.map_style.fetch import Fetcher, FetchError, kept_draws
from hpctrain.data.loading.map_style.workers import PassJob
from hpctrain.data.loading.prefetch import ALIGNMENT_BYTES, Prefetch
from hpctrain.data.loading.worker_pool import WorkerError, Workers
from hpctrain.errors import ConfigError, TrainingError

BATCHES_READY = 1
"""Batches that wait for the consumer, besides the passes that are being read."""

Passes = dict[tuple[int, int], Any]
"""What `collate_fn` made of each pass, by its first sample in the share and one past its last."""


class Share(NamedTuple):
    """A rank's share of a global batch, to be read.

    Attributes:
        rows: (count,) int64.
        keys: (count,) uint64.
        passes: that it is cut into.
        global_size: samples of the global batch.
        epoch, start: of the global batch.
    """

    rows: Int64s
    keys: UInt64s
    passes: int
    global_size: int
    epoch: int
    start: int


@dataclass(frozen=True, slots=True)
class CollatedBatch:
    """This rank's share of a global batch, cut into passes before it was put together.

    Attributes:
        passes: by their ranges.
        size: samples of this share; may be 0.
        global_size: samples of the global batch.
        epoch: from 0.
        start: position in the epoch of the first sample of the global batch.
    """

    passes: Passes
    size: int
    global_size: int
    epoch: int
    start: int
    cuts: ClassVar[None] = None

    @property
    def fields(self) -> Any:
        """All of the share, where it is one pass; else its passes."""
        return self.passes.get((0, self.size), list(self.passes.values()))

    def part(self, first: int, stop: int) -> Any:
        """Return the samples first to stop - 1, which are one pass."""
        return self.passes[first, stop]


class Fetched:
    """Some samples at hand, of which any range is put together when it is asked for.

    Attributes:
        size: how many there are.
    """

    def __init__(self, samples: Sequence[Any], together: Callable[[list[Any]], Any]) -> None:
        self.size = len(samples)
        self._samples = samples
        self._together = together
        self._made: Passes = {}

    @property
    def fields(self) -> Any:
        """All of them."""
        return self.part(0, self.size)

    def part(self, first: int, stop: int) -> Any:
        """Return the samples first to stop - 1."""
        if (first, stop) not in self._made:
            self._made[first, stop] = self._together(list(self._samples[first:stop]))
        return self._made[first, stop]

    def repeated(self, count: int) -> Any:
        """Return the first of them so many times."""
        return self._together([self._samples[0]] * count)


class PassReader:
    """Reads shares of one Dataset, and brings them to the device.

    Where there are workers they read ahead; else the rank reads each batch itself when it is
    wanted: its generators are those that the training draws from, so that no thread may use them
    meanwhile.
    """

    def __init__(
        self,
        dataset: MapDataset,
        fetcher: Fetcher,
        workers: Workers[PassJob, Any] | None,
        device: torch.device,
        names: Sequence[str] = (),
    ) -> None:
        """Prepare; nothing is read yet.

        Args:
            dataset: what is read.
            fetcher: reads it in this process.
            workers: read it ahead; None: nobody does.
            device: where batches are wanted.
            names: of the fields that a task asks for; none: a batch is left as it is.
        """
        self._dataset = dataset
        self._fetcher = fetcher
        self._workers = workers
        self._device = device
        self._names = tuple(names)
        self._copies = DeviceCopies(Streams(device)) if device.type in COPIES_ASIDE else None
        self._running: Prefetch[tuple[Share, Passes]] | None = None
        self._waited = 0.0

    @property
    def wait_seconds(self) -> float:
        """How long the consumer has waited for batches so far."""
        running = self._running
        return self._waited + (running.wait_seconds if running is not None else 0.0)

    def run(self, shares: Iterator[Share]) -> Iterator[CollatedBatch]:
        """Yield the batches of shares that follow each other.

        Raises:
            DatasetError, TrainingError: naming the sample that cannot be had.
        """
        self.stop()
        if self._workers is None:
            for share in shares:
                began = time.perf_counter()
                passes = self._here(share)
                self._waited += time.perf_counter() - began
                yield self._batch(share, passes, [])
            return
        with Prefetch(lambda: self._read_ahead(shares), BATCHES_READY) as running:
            self._running = running
            try:
                yield from self._arriving(running)
            finally:
                if self._running is running:
                    self._waited += running.wait_seconds
                    self._running = None

    def held(self, rows: Int64s, keys: UInt64s) -> Fetched:
        """Return samples, read by the calling thread.

        Raises:
            DatasetError, TrainingError: if one cannot be had.
        """
        with kept_draws():
            samples = self._told(rows, lambda: self._fetcher.samples(rows, keys))

        def together(some: list[Any]) -> Any:
            with kept_draws():
                made = self._told(rows, lambda: self._fetcher.together(some))
            return moved(self._named(made), self._device)

        return Fetched(samples, together)

    def stop(self) -> None:
        """End the thread that reads ahead, if one does."""
        if self._running is not None:
            self._running.close()
            self._waited += self._running.wait_seconds
            self._running = None

    def close(self) -> None:
        """End all workers."""
        self.stop()
        if self._workers is not None:
            self._workers.close()

    def _read_ahead(self, shares: Iterator[Share]) -> Iterator[tuple[Share, Passes]]:
        """Yield shares in their order, in the thread that reads ahead."""
        assert self._workers is not None
        enter(self._device)  # pinned memory is the current device's
        ahead = max(1, self._dataset.workers) * self._dataset.prefetch
        pending: deque[tuple[Share, list[tuple[tuple[int, int], Future[Any]]]]] = deque()
        waiting = 0
        try:
            for share in shares:
                jobs = self._submitted(share)
                pending.append((share, jobs))
                waiting += len(jobs)
                while waiting >= ahead and len(pending) > 1:
                    waiting -= len(pending[0][1])
                    yield self._collected(*pending.popleft())
            while pending:
                yield self._collected(*pending.popleft())
        finally:
            left = [future for _, jobs in pending for _, future in jobs]
            for future in left:
                future.cancel()
            wait(left)

    def _submitted(self, share: Share) -> list[tuple[tuple[int, int], Future[Any]]]:
        assert self._workers is not None
        return [(bounds, self._workers.submit(job)) for bounds, job in _jobs(share)]

    def _collected(
        self, share: Share, jobs: Sequence[tuple[tuple[int, int], Future[Any]]]
    ) -> tuple[Share, Passes]:
        """Wait for the passes of a share."""
        passes: Passes = {}
        for bounds, future in jobs:
            rows = share.rows[slice(*bounds)]
            made = self._named(self._told(rows, future.result))
            passes[bounds] = made if self._copies is None else map_tensors(_pinned, made)
        return share, passes

    def _here(self, share: Share) -> Passes:
        """Read a share in the consumer's thread."""
        passes: Passes = {}
        for bounds, job in _jobs(share):
            with kept_draws():
                made = self._told(job.rows, functools.partial(self._fetcher.collated, *job))
            passes[bounds] = map_tensors(_aligned, self._named(made))
        return passes

    def _arriving(self, running: Prefetch[tuple[Share, Passes]]) -> Iterator[CollatedBatch]:
        """Yield batches on the device; the next one is copied while the consumer has this one."""
        if self._copies is None:
            for share, passes in running:
                yield self._batch(share, passes, [])
            return
        ahead: deque[tuple[Share, Passes, list[Callable[[], None]]]] = deque()
        for share, passes in running:
            ahead.append(self._copied(share, passes))
            while ahead:
                current = ahead.popleft()
                if (following := running.waiting()) is not None:
                    ahead.append(self._copied(*following))
                yield self._batch(*current)

    def _copied(
        self, share: Share, passes: Passes
    ) -> tuple[Share, Passes, list[Callable[[], None]]]:
        """Begin to copy the tensors of a share to the device."""
        assert self._copies is not None
        with self._copies.of(passes) as copying:
            there = {
                bounds: map_tensors(lambda tensor: copying.copy(tensor, pinned=True), made)
                for bounds, made in passes.items()
            }
        return share, there, [copying.require]

    def _batch(
        self, share: Share, passes: Passes, require: Sequence[Callable[[], None]]
    ) -> CollatedBatch:
        """Return a share as the consumer gets it; objects that move themselves do so here."""
        for each in require:
            each()
        if self._device.type != "cpu":
            passes = {bounds: moved(made, self._device) for bounds, made in passes.items()}
        size = len(share.rows)
        return CollatedBatch(passes, size, share.global_size, share.epoch, share.start)

    def _told(self, rows: Int64s, read: Callable[[], Any]) -> Any:
        """Return what `read` does; what it raises is told with the samples."""
        try:
            return read()
        except FetchError as error:
            raise self._dataset.failed(error, rows) from error
        except WorkerError as error:
            raise TrainingError(
                f"{error}. It had {len(rows)} samples of {self._dataset.source}: "
                f"{', '.join(map(str, rows[:8].tolist()))}{', ...' if len(rows) > 8 else ''}"
            ) from error

    def _named(self, made: Any) -> Any:
        """Return a pass with the names that a task asks for.

        Raises:
            ConfigError: if it has others.
        """
        names = self._names
        if not names:
            return made
        if isinstance(made, dict):
            if all(name in made for name in names):
                return made
            missing = [name for name in names if name not in made]
            raise ConfigError(
                f'task.inputs, task.target: {self._dataset.source} gives no "{missing[0]}"; its '
                f"samples have {', '.join(map(str, made))}"
            )
        values = made if isinstance(made, list | tuple) else [made]
        if len(values) != len(names) or not all(isinstance(each, Tensor) for each in values):
            raise ConfigError(
                f"task.inputs, task.target: {self._dataset.source} gives {len(values)} values a "
                f"sample, and the task names {len(names)} fields in their order: "
                f"{', '.join(names)}. Name as many, have the Dataset return a dict, or its samples "
                "put together by a collate_fn that makes one"
            )
        return dict(zip(names, values, strict=True))


def _jobs(share: Share) -> Iterator[tuple[tuple[int, int], PassJob]]:
    """Yield the passes of a share that have samples."""
    for first, stop in cut(len(share.rows), share.passes):
        if first < stop:
            yield (first, stop), PassJob(share.rows[first:stop], share.keys[first:stop])


def _pinned(tensor: Tensor) -> Tensor:
    return tensor.pin_memory() if tensor.device.type == "cpu" and not tensor.is_sparse else tensor


def _aligned(tensor: Tensor) -> Tensor:
    """Return a tensor that begins where fresh ones do, see `Delivery`."""
    if tensor.layout != torch.strided or tensor.data_ptr() % ALIGNMENT_BYTES == 0:
        return tensor
    return tensor.clone()
