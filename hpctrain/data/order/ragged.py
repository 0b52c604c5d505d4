"""Samples of unequal length: which rows of values each of them holds. Pure arithmetic.

Values lie one after the other, as tokens of all texts or atoms of all molecules do. What a file
says of where samples begin is checked before anything is read by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xxhash

from hpctrain.data.arrays import Int64s
from hpctrain.errors import DatasetError

LOOKED_AHEAD = 64
"""Samples, at first, that are looked at to find those of a pass."""
Batching = Literal["pad", "concat", "dense", "csr", "indices", "encoded"]


@dataclass(frozen=True)
class Lengths:
    """Which rows of values belong to each sample.

    Attributes:
        firsts: (samples,) int64, the first row of each, counted over all files.
        counts: (samples,) int64, rows.
        stops: (files,) int64, one past the last sample of each file.
    """

    firsts: Int64s
    counts: Int64s
    stops: Int64s

    @property
    def samples(self) -> int:
        return len(self.counts)

    @cached_property
    def mean(self) -> int:
        """Rows of a sample on average, rounded up; 1 at least."""
        return max(1, -(-int(self.counts.sum()) // len(self.counts)))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all of it, 16 hexadecimal digits."""
        made = xxhash.xxh3_64()
        for numbers in (self.firsts, self.counts):
            made.update(np.ascontiguousarray(numbers).tobytes())
        return str(made.hexdigest())


@dataclass(frozen=True)
class Heap:
    """Where the values of variable-length HDF5 datasets are: anywhere in their files.

    Attributes:
        lengths: which values each row has, counted one row after the other.
        collections: (rows,) int64, bytes from the start of the file to a collection of its global
            heap; 0: there are no values; -1: only HDF5 knows.
        objects: (rows,) uint32, the number of the object in it.
    """

    lengths: Lengths
    collections: Int64s
    objects: npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Raggedness:
    """How samples of unequal length are put into a batch.

    Attributes:
        batch: "pad": to the longest of a pass; "concat": one after the other, with offsets;
            "dense", "csr": as rows of a matrix, dense or sparse; "indices": their columns;
            "encoded": as what the values are decoded to.
        max_length: rows of a sample that are kept, the first ones; None: all.
        pad: the number behind the values of a sample.
        mask: name of a field: 1 where there is a value, 0 behind it; None: there is none.
        sample: name of a field: of each row the sample that it is of; None: there is none.
        shift_by: another field of the sample; these values are indices of its rows, and of those
            of the whole pass in a batch; None: they are none.
        indices: of rows of a matrix, the field that says which columns the values are of.
        columns: of rows of a matrix, how many there are, and of indices, how many there may be.
    """

    batch: Batching
    max_length: int | None = None
    pad: float = 0.0
    mask: str | None = None
    sample: str | None = None
    shift_by: str | None = None
    indices: str | None = None
    columns: int | None = None

    def kept(self, counts: Int64s) -> Int64s:
        """Return the rows of samples that are left of so many."""
        return counts if self.max_length is None else np.minimum(counts, self.max_length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """Facts of documents whose values follow each other and are cut into samples.

    Attributes:
        sample: name of a field: of each value the document of the sample, from 0; None: none.
        position: name of a field: of each value its place in what the sample has of its document,
            from 0; None: none.
    """

    sample: str | None = None
    position: str | None = None


class Source(tuple[str, str]):
    """Where counts or offsets are, for messages: (file, HDF5 dataset)."""

    __slots__ = ()

    def problem(self, row: int, what: str) -> DatasetError:
        path, name = self
        return DatasetError(f'{path}: "{name}", row {row}: {what}')


def as_numbers(stored: npt.NDArray[Any], at: Source) -> Int64s:
    """Return counts or offsets as int64.

    Raises:
        DatasetError: if one is not a number of rows that a file may have.
    """
    if stored.ndim != 1 or stored.dtype.kind not in "iu":
        path, name = at
        raise DatasetError(
            f'{path}: "{name}" is {stored.dtype} of shape {stored.shape[1:]} a row, and has to be '
            "one whole number a sample: where its values begin (offsets), or how many it has "
            "(counts)"
        )
    wrong = (stored < 0) | (stored > np.array(2**62).astype(np.uint64))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise at.problem(row, f"{stored[row]} is not a number of rows: the file is damaged")
    return stored.astype(np.int64)


def has_end(offsets: Sequence[Int64s], values: Sequence[int]) -> bool:
    """Tell whether the last offset of files is the end of their values, and no sample's begin."""
    return all(int(each[-1]) == total for each, total in zip(offsets, values, strict=True))


def of_offsets(offsets: Int64s, values: int, *, ended: bool, at: Source) -> tuple[Int64s, Int64s]:
    """Return the first row of the samples of a file, and how many rows each has.

    Args:
        offsets: where the values of each sample begin.
        values: rows in the file.
        ended: whether the last offset is the end of them all.
        at: where they are from.

    Raises:
        DatasetError: naming an offset that goes back, or leads out of the values.
    """
    bounds = offsets if ended else np.append(offsets, values)
    if len(bounds) < 2:
        raise at.problem(0, "there is no sample before the end of the values")
    if bounds[0] != 0:
        raise at.problem(0, f"the offset of the first sample is {bounds[0]}, and not 0")
    outside = np.flatnonzero(offsets > values)
    if len(outside):
        row = int(outside[0])
        raise at.problem(row, f"the offset {offsets[row]} is past the end: there are {values} rows")
    counts = np.diff(bounds)
    back = np.flatnonzero(counts < 0)
    if len(back):
        row = int(back[0])
        raise at.problem(row + 1, f"offsets go back, from {bounds[row]} to {bounds[row + 1]}")
    return bounds[:-1], counts


def of_counts(counts: Int64s, values: int, at: Source) -> tuple[Int64s, Int64s]:
    """Return the first row of the samples of a file, and how many rows each has.

    Raises:
        DatasetError: if the counts do not add up to the rows that there are.
    """
    large = np.flatnonzero(counts > values)
    if len(large):
        row = int(large[0])
        raise at.problem(row, f"a sample of {counts[row]} rows, but there are {values}")
    total = sum(int(part.sum()) for part in np.array_split(counts, len(counts) // 2**20 + 1))
    if total != values:
        raise at.problem(len(counts) - 1, f"the counts make {total} rows, but there are {values}")
    return np.cumsum(counts) - counts, counts


def joined(files: Sequence[tuple[Int64s, Int64s]], values: Sequence[int]) -> Lengths:
    """Return the samples of files that follow each other.

    Args:
        files: first row and count of each sample of a file.
        values: rows of values in each file.
    """
    before = np.cumsum([0, *values], dtype=np.int64)[:-1]
    firsts = [first + start for (first, _), start in zip(files, before.tolist(), strict=True)]
    counts = [count for _, count in files]
    stops = np.cumsum([len(each) for each in counts], dtype=np.int64)
    return Lengths(np.concatenate(firsts), np.concatenate(counts), stops)


def cut_by_values(
    counts: Sequence[tuple[Int64s, bool]], most: int, most_samples: int | None
) -> list[tuple[int, int]]:
    """Cut samples into passes of which no field has more than so many values.

    Args:
        counts: of each field, rows of the samples, and whether they are padded to the longest.
        most: values of a field in a pass, those that are padded included; no sample has more.
        most_samples: of a pass; None: any number.

    Returns:
        The first sample of each pass and one past its last; (0, 0) alone of no samples.
    """
    samples = len(counts[0][0])
    cuts, start, likely = [], 0, LOOKED_AHEAD
    while start < samples:
        left = samples - start if most_samples is None else min(most_samples, samples - start)
        # To look at all that are left for each pass would be quadratic.
        looked = min(left, likely)
        fitting = _fitting([(rows[start : start + looked], pads) for rows, pads in counts], most)
        if fitting == looked < left:
            likely *= 2
            continue
        stop = start + max(1, fitting)
        cuts.append((start, stop))
        start = stop
    return cuts or [(0, 0)]


def _fitting(counts: Sequence[tuple[Int64s, bool]], most: int) -> int:
    """Return how many of the first samples have no more values than that, in any field."""
    fitting = len(counts[0][0])
    for rows, is_padded in counts:
        some = rows[:fitting]
        if is_padded:
            taken = np.maximum.accumulate(some) * np.arange(1, len(some) + 1)
        else:
            taken = np.cumsum(some)
        fitting = min(fitting, int(np.searchsorted(taken, most, side="right")))
    return fitting
