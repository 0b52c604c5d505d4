"""What a loader hands on: a rank's share of a global batch, and samples to try things with."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy.typing as npt
import torch
from torch import Tensor

from hpctrain.data.arrays import Int64s
from hpctrain.data.order.order import Order


class Samples(Protocol):
    """Some samples, of which any range can be had as a task gets it.

    How many there are is known here, and never guessed from a tensor: the first axis of what a
    `collate_fn` makes may count anything.
    """

    @property
    def size(self) -> int:
        """How many samples there are."""
        ...

    def part(self, first: int, stop: int) -> Any:
        """Return the fields of the samples first to stop - 1, one at least."""
        ...


@dataclass(frozen=True, slots=True)
class Rows:
    """Samples that are rows of tensors.

    Attributes:
        fields: by name, (size, ...).
    """

    fields: Mapping[str, Tensor]

    @property
    def size(self) -> int:
        """How many rows there are."""
        return len(next(iter(self.fields.values())))

    def part(self, first: int, stop: int) -> dict[str, Tensor]:
        """Return the rows first to stop - 1."""
        return {name: tensor[first:stop] for name, tensor in self.fields.items()}


def repeated(rows: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Return rows so many times."""
    return {name: torch.cat([tensor] * count) for name, tensor in rows.items()}


class ShareOfBatch(Protocol):
    """This rank's share of a global batch.

    Attributes:
        fields: of all its samples.
        size: samples of this share; may be 0, then the fields are of no use.
        global_size: samples of the global batch.
        epoch: from 0.
        start: position in the epoch of the first sample of the global batch.
        cuts: the ranges of samples that are passes, as many on every rank; None: as `cut` has
            them.
    """

    @property
    def fields(self) -> Any: ...
    @property
    def cuts(self) -> Sequence[tuple[int, int]] | None: ...
    @property
    def size(self) -> int: ...
    @property
    def global_size(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def start(self) -> int: ...
    def part(self, first: int, stop: int) -> Any:
        """Return the fields of the samples first to stop - 1: those of one pass."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """This rank's share of a global batch, in rows of tensors.

    The tensors are the consumer's for as long as it keeps them: memory is used again only when
    nothing refers to it any more.

    Attributes:
        fields: by name, (size, *shape) on the device, in the dtype of the dataset where nothing
            else is asked for.
        size: samples of this share; may be 0, then the tensors have no rows.
        global_size: samples of the global batch.
        epoch: from 0.
        start: position in the epoch of the first sample of the global batch.
    """

    fields: dict[str, Tensor]
    size: int
    global_size: int
    epoch: int
    start: int
    cuts: ClassVar[None] = None

    def part(self, first: int, stop: int) -> dict[str, Tensor]:
        """Return the rows first to stop - 1: those of one pass."""
        return {name: tensor[first:stop] for name, tensor in self.fields.items()}


class TrainBatches(Protocol):
    """What serves the epochs of a dataset, whatever it is made of; see `TrainLoader`."""

    epoch_size: int
    largest_share: int
    smallest_share: int
    largest_pass: int | None
    buffer_bytes: int

    @property
    def wait_seconds(self) -> float:
        """How long the consumer has waited for batches so far."""
        ...

    @property
    def failed_reads(self) -> int:
        """How often a read failed so far, whatever came of it."""
        ...

    def order_of(self, epoch: int, /) -> Order:
        """Return the order of an epoch, for the resume state."""
        ...

    def epoch(self, epoch: int, start: int = 0, /) -> Iterator[ShareOfBatch]:
        """Yield this rank's share of every global batch of an epoch, from a position on."""
        ...

    def example(self, count: int = 1) -> Any:
        """Return one real sample so many times, as a pass has it, on the device."""
        ...

    def examples(self, most: int) -> Samples:
        """Return some real samples: at most `most`, as many on every rank."""
        ...

    def rows(self, epoch: int, start: int, stop: int, /) -> Int64s:
        """Return which samples this rank serves of positions of an epoch."""
        ...

    def runs(self, rows: Int64s) -> list[tuple[str, int, int]]:
        """Return runs of samples, ascending, as (where they are, the first there, the last)."""
        ...

    def read(self, rows: Int64s) -> dict[str, npt.NDArray[Any]]:
        """Return what samples hold, by name, read apart from the epochs."""
        ...

    def close(self) -> None:
        """End what reads. The loader can be used again."""
        ...


class EvaluationBatches(Protocol):
    """What serves every sample exactly once over all ranks; see `EvaluationLoader`."""

    buffer_bytes: int

    def __len__(self) -> int: ...
    @property
    def most_batches(self) -> int:
        """How many batches the rank with the most samples has."""
        ...

    @property
    def wait_seconds(self) -> float:
        """How long the consumer has waited for batches so far."""
        ...

    def __iter__(self) -> Iterator[ShareOfBatch]: ...
    def examples(self, most: int) -> Samples:
        """Return some real samples of this rank: at most `most`, as many on every rank."""
        ...

    def example_rows(self, most: int) -> Int64s:
        """Return which samples `examples` gives."""
        ...

    def close(self) -> None:
        """End what reads. The loader can be used again."""
        ...


def count_passes(largest_share: int, micro_batch_size: int | None) -> int:
    """Return the forward passes of a step, the same on every rank.

    Args:
        largest_share: the most samples of any rank in any batch.
        micro_batch_size: at most so many samples in one pass; None: the whole share.
    """
    if micro_batch_size is None:
        return 1
    return max(1, -(-largest_share // micro_batch_size))


@functools.cache  # a run has two or three shares, and asks in every step
def cut(share: int, passes: int) -> tuple[tuple[int, int], ...]:
    """Cut `share` samples into `passes` ranges of sizes as equal as can be.

    Returns:
        (first, stop) of every pass; first == stop where there are fewer samples than passes. The
        last is empty only if the share is.
    """
    bounds = [index * share // passes for index in range(passes + 1)]
    return tuple(itertools.pairwise(bounds))
