"""What a loader hands on: a rank's share of a global batch, and samples to try things with."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


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
    """

    @property
    def fields(self) -> Any: ...
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

    def part(self, first: int, stop: int) -> dict[str, Tensor]:
        """Return the rows first to stop - 1: those of one pass."""
        return {name: tensor[first:stop] for name, tensor in self.fields.items()}


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
