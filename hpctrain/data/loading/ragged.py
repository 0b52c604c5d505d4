"""Batches with samples of unequal length: padded, or one after the other with offsets.

What a pass gets is made when the pass is: of values that lie one after the other on the device,
padded to the longest of this pass, and not to that of the batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hpctrain.data.arrays import Int64s
from hpctrain.data.order.ragged import Raggedness
from hpctrain.data.view import View

Finish = Callable[[dict[str, Tensor], Tensor | None], dict[str, Tensor]]
"""What is done to the fields of a pass, which have these keys."""


class Values(NamedTuple):
    """The values of a field of some samples.

    Attributes:
        values: (rows of all, *shape) on the device.
        offsets: (samples + 1,) int64 on the device: where those of each sample begin in it.
        bounds: the same on the host.
    """

    values: Tensor
    offsets: Tensor
    bounds: Int64s

    def part(self, first: int, stop: int) -> Values:
        """Return those of the samples first to stop - 1."""
        bounds = self.bounds[first : stop + 1]
        begin = int(bounds[0])
        offsets = self.offsets[first : stop + 1]
        return Values(
            self.values[begin : int(bounds[-1])],
            offsets - begin if begin else offsets,
            bounds - begin,
        )

    def repeated(self, count: int) -> Values:
        """Return all samples so many times."""
        counts = np.tile(np.diff(self.bounds), count)
        bounds = np.concatenate(([0], np.cumsum(counts)))
        offsets = torch.from_numpy(bounds).to(self.offsets.device)
        return Values(torch.cat([self.values] * count), offsets, bounds)

    @property
    def owners(self) -> Tensor:
        """Of each row the sample that it is of, (rows,) int64."""
        counts = self.offsets.diff()
        numbers = torch.arange(len(counts), device=counts.device)
        return torch.repeat_interleave(numbers, counts, output_size=len(self.values))


@dataclass(frozen=True)
class RaggedRows:
    """Samples of which some fields are of unequal length.

    Attributes:
        fields: the others, by name, (size, *shape) on the device.
        ragged: those, by name.
        how: how they are put into a pass, by name.
        finish: what is done to a pass in the end.
        keys: of the samples, for that; None: it takes none.
        size: how many samples there are.
    """

    fields: Mapping[str, Tensor]
    ragged: Mapping[str, Values]
    how: Mapping[str, Raggedness]
    finish: Finish
    keys: Tensor | None
    size: int

    def part(self, first: int, stop: int) -> dict[str, Tensor]:
        """Return the samples first to stop - 1 as a pass has them."""
        fields = {name: tensor[first:stop] for name, tensor in self.fields.items()}
        parts = {name: each.part(first, stop) for name, each in self.ragged.items()}
        for name, each in parts.items():
            fields |= self._batched(name, each, parts)
        keys = None if self.keys is None else self.keys[first:stop]
        return self.finish(fields, keys)

    def repeated(self, count: int) -> dict[str, Tensor]:
        """Return all samples so many times, as a pass has them."""
        made = RaggedRows(
            {name: torch.cat([tensor] * count) for name, tensor in self.fields.items()},
            {name: each.repeated(count) for name, each in self.ragged.items()},
            self.how,
            self.finish,
            None if self.keys is None else torch.cat([self.keys] * count),
            self.size * count,
        )
        return made.part(0, made.size)

    def _batched(self, name: str, own: Values, others: Mapping[str, Values]) -> dict[str, Tensor]:
        """Return a field as a pass has it, with what lies beside it."""
        how, values = self.how[name], own.values
        if how.batch == "indices":
            return {}
        if how.indices is not None:
            return {name: _matrix(own, others[how.indices].values, how)}
        if how.shift_by is not None:
            begins = others[how.shift_by].offsets[:-1][own.owners]
            values = values.long() + begins.view(-1, *[1] * (values.ndim - 1))
        made = {}
        if how.batch == "pad":
            made[name], present = padded(own._replace(values=values), how.pad)
            if how.mask is not None:
                made[how.mask] = present.to(torch.float32)
        else:
            made[name], made[f"{name}.offsets"] = values, own.offsets
        if how.sample is not None:
            made[how.sample] = own.owners
        return made


def _matrix(own: Values, indices: Tensor, how: Raggedness) -> Tensor:
    """Return rows of a sparse matrix, (samples, columns), dense or sparse."""
    assert how.columns is not None
    samples, indices = len(own.bounds) - 1, indices.long()
    if how.batch == "csr":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            return torch.sparse_csr_tensor(
                own.offsets, indices, own.values, (samples, how.columns), check_invariants=False
            )
    bits = _SIGNED.get(own.values.dtype, own.values.dtype)
    whole = torch.zeros(samples * how.columns, dtype=bits, device=indices.device)
    # Files may have a column twice in a row, which is the sum of both.
    whole.scatter_add_(0, own.owners * how.columns + indices, own.values.view(bits))
    return whole.view(own.values.dtype).view(samples, how.columns)


def padded(own: Values, pad: float) -> tuple[Tensor, Tensor]:
    """Return samples as one tensor, and where it has a value.

    Returns:
        (samples, longest, *shape), and (samples, longest) bool; longest is 1 at least.
    """
    values, bounds = own.values, own.bounds
    samples = len(bounds) - 1
    longest = max(1, int(np.diff(bounds).max(initial=0)))
    places = torch.arange(longest, device=values.device)
    present = places < own.offsets.diff()[:, None]
    shape = (samples, longest, *values.shape[1:])
    whole = torch.full(shape, pad, dtype=values.dtype, device=values.device)
    where = present.view(samples, longest, *[1] * (values.ndim - 1))
    # As signed ones: torch has few functions for others of more than a byte.
    bits = _SIGNED.get(values.dtype)
    if bits is None:
        return whole.masked_scatter_(where, values), present
    whole.view(bits).masked_scatter_(where, values.view(bits))
    return whole, present


def documents_of(view: View, name: str, samples: Int64s, device: torch.device) -> dict[str, Tensor]:
    """Return what is told of the documents that samples of a field are cut from.

    Returns:
        By name, (samples, length) int64 on the device.
    """
    packing, length = view.columns[name].packing, view.columns[name].num_rows
    assert packing is not None
    owners, after = view.documents_in(name, samples)
    begins = torch.from_numpy(owners * length + after).to(device)
    is_begin = torch.zeros(len(samples) * length, dtype=torch.int64, device=device)
    is_begin = is_begin.index_fill_(0, begins, 1).view(len(samples), length)
    made = {}
    if packing.sample is not None:
        made[packing.sample] = is_begin.cumsum(1)
    if packing.position is not None:
        places = torch.arange(length, device=device)
        made[packing.position] = places - (places * is_begin).cummax(1).values
    return made


_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


@dataclass(frozen=True, kw_only=True)
class RaggedBatch:
    """This rank's share of a global batch, of samples of unequal length.

    Attributes:
        rows: the samples.
        size: how many they are; may be 0.
        global_size: samples of the global batch.
        epoch: from 0.
        start: position in the epoch of the first sample of the global batch.
        cuts: the ranges of samples that are passes; None: as `cut` has them.
    """

    rows: RaggedRows
    size: int
    global_size: int
    epoch: int
    start: int
    cuts: Sequence[tuple[int, int]] | None = None

    @cached_property
    def fields(self) -> dict[str, Tensor]:
        """All of them, as one pass has them."""
        return self.rows.part(0, self.size)

    def part(self, first: int, stop: int) -> dict[str, Tensor]:
        """Return the fields of the samples first to stop - 1: those of one pass."""
        return self.rows.part(first, stop)
