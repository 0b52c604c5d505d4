"""Batches: a rank's share of a global batch, samples to try things with, batches of any structure.

A structure is tensors in dicts, lists, tuples and dataclasses, and what lies beside them.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
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


def finite(tensor: Tensor) -> Tensor:
    """Return numbers with 0 where there is none; what are no floats stays as it is."""
    if not tensor.is_floating_point():
        return tensor
    if tensor.layout == torch.sparse_csr:
        made = tensor.clone()
        made.values().nan_to_num_(0.0, 0.0, 0.0)
        return made
    return torch.nan_to_num(tensor, 0.0, 0.0, 0.0)


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


def map_tensors(
    function: Callable[[Tensor], Tensor],
    data: Any,
    others: Callable[[Any], Any] = lambda leaf: leaf,
) -> Any:
    """Return the same structure with every tensor replaced.

    Args:
        function: of a tensor.
        data: any nesting of dicts, lists, tuples, named tuples and dataclasses.
        others: of what is neither a tensor nor one of these.
    """
    if isinstance(data, Tensor):
        return function(data)
    if isinstance(data, Mapping):
        items = {key: map_tensors(function, value, others) for key, value in data.items()}
        return items if type(data) is dict else _rebuilt_mapping(data, items, others)
    if isinstance(data, list | tuple):
        values = [map_tensors(function, value, others) for value in data]
        if hasattr(data, "_fields"):
            return type(data)(*values)
        return values if type(data) is list else type(data)(values)
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        # Not made anew: its constructor may want what no field holds.
        made = copy.copy(data)
        for field in dataclasses.fields(data):
            value = map_tensors(function, getattr(data, field.name), others)
            object.__setattr__(made, field.name, value)
        return made
    return others(data)


def _rebuilt_mapping(
    data: Mapping[Any, Any], items: dict[Any, Any], others: Callable[[Any], Any]
) -> Any:
    """Return a mapping of the same type with other items."""
    if hasattr(data, "to"):  # it moves itself, and knows how it is built
        moved = others(data)
        if moved is not data:
            return moved
    made: Any = copy.copy(data)
    try:
        made.update(items)
    except (AttributeError, TypeError):
        return items
    return made


def moved(data: Any, device: torch.device, move: Callable[[Tensor], Tensor] | None = None) -> Any:
    """Return a structure on a device.

    Args:
        data: as `map_tensors` takes it.
        device: where to.
        move: what moves a tensor; None: its own method.
    """

    def itself(leaf: Any) -> Any:
        to = getattr(leaf, "to", None)
        return to(device) if callable(to) and not isinstance(leaf, type) else leaf

    return map_tensors(move or (lambda tensor: tensor.to(device)), data, itself)


def bytes_of(tensor: Tensor) -> Tensor:
    """Return the values of a tensor of the host one after the other, (bytes,) uint8.

    It is the memory of the tensor where its values lie there in this order.
    """
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1).contiguous()
    if flat.numel() == 1:
        # Of one value torch takes any stride for contiguous, and views only a stride of 1 as bytes.
        flat = flat.as_strided((1,), (1,))
    return flat.view(torch.uint8)


def named_tensors(data: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a structure, each with where it is, such as "image" or "1.mask"."""
    if isinstance(data, Tensor):
        yield name, data
        return
    inner: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(data, Mapping):
        inner = iter(data.items())
    elif isinstance(data, list | tuple):
        inner = iter(zip(getattr(data, "_fields", range(len(data))), data, strict=True))
    elif dataclasses.is_dataclass(data) and not isinstance(data, type):
        inner = iter((field.name, getattr(data, field.name)) for field in dataclasses.fields(data))
    for key, value in inner:
        yield from named_tensors(value, f"{name}.{key}" if name else str(key))
