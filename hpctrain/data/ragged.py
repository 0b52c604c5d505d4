"""Samples of unequal length, as they are written: their values, and how many each sample has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hpctrain.data.arrays import Int64s
from hpctrain.data.dataset import Field

COUNTS = "_counts"
"""Behind the name of a field of unequal length: that of how many values each sample has."""


@dataclass(frozen=True, slots=True, eq=False)
class Ragged:
    """Samples of unequal length.

    Attributes:
        values: (rows, *shape), those of one sample after those of the one before.
        counts: (samples,) int64, how many rows of `values` each sample has.
    """

    values: npt.NDArray[Any]
    counts: Int64s

    def __post_init__(self) -> None:
        if self.counts.ndim != 1 or self.counts.dtype != np.int64:
            raise ValueError(
                f"the counts are {self.counts.dtype} of shape {self.counts.shape}: give one int64 "
                "a sample"
            )
        if (self.counts < 0).any() or not self.values.ndim:
            raise ValueError("a sample cannot have fewer than 0 values, nor be without an axis")
        if int(self.counts.sum()) != len(self.values):
            raise ValueError(
                f"the counts make {int(self.counts.sum())} values, but there are {len(self.values)}"
            )

    @classmethod
    def of(cls, samples: Sequence[npt.ArrayLike]) -> Ragged:
        """Put samples one after the other, each (its length, *shape); all of one dtype.

        Raises:
            ValueError: if one has no axis, or another shape or dtype; or if there are none.
        """
        arrays = [np.asarray(each) for each in samples]
        kinds = {(each.dtype, each.shape[1:]) for each in arrays}
        if len(kinds) != 1 or not all(each.ndim for each in arrays):
            raise ValueError(
                "give samples of unequal length as arrays of one dtype, and of one shape but for "
                "their first axis: these are "
                + (", ".join(sorted(f"{kind} {shape}" for kind, shape in kinds)) or "none")
            )
        return cls(np.concatenate(arrays), np.array([len(each) for each in arrays], np.int64))

    def __len__(self) -> int:
        return len(self.counts)

    def samples(self) -> list[npt.NDArray[Any]]:
        """Return each sample, which is not copied."""
        return np.split(self.values, np.cumsum(self.counts)[:-1]) if len(self.counts) else []


def stored_fields(fields: Mapping[str, Field]) -> dict[str, Field]:
    """Return what has a row for each sample: of fields with `mean_rows`, how many values it has."""
    return {
        f"{name}{COUNTS}" if field.mean_rows else name: Field((), np.dtype(np.int64))
        if field.mean_rows
        else field
        for name, field in fields.items()
    }


def ragged_in(fields: Mapping[str, Field]) -> dict[str, Field]:
    """Return the values of fields of unequal length, a row for each value."""
    return {name: Field(f.shape, f.dtype) for name, f in fields.items() if f.mean_rows}


class Shelf:
    """Samples of which some are of unequal length, until there are enough of them for a shard.

    Every shard has a value in each of these fields, since what has no rows is no dataset of HDF5
    that could be read: samples without any wait for the next ones.
    """

    def __init__(self, ragged: Iterable[str], shard_bytes: int, shard_rows: int | None) -> None:
        """Prepare.

        Args:
            ragged: names of the fields of unequal length.
            shard_bytes: values in one shard, about.
            shard_rows: samples in one shard, where there are values; None: by their bytes.
        """
        self._ragged = frozenset(ragged)
        self._shard_bytes = shard_bytes
        self._shard_rows = shard_rows
        self._samples: list[dict[str, npt.NDArray[Any]]] = []
        self._bytes: list[int] = []
        self._stop: int | None = None
        self._lacking = set(self._ragged)
        self._held = 0

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def lacking(self) -> set[str]:
        """Fields of which no sample here has a value."""
        return {name for name in self._ragged if not any(len(each[name]) for each in self._samples)}

    def add(self, sample: Mapping[str, npt.NDArray[Any]]) -> Iterator[dict[str, Any]]:
        """Take one sample, which is copied, and yield what makes a whole shard."""
        self._samples.append({name: np.array(value) for name, value in sample.items()})
        self._bytes.append(sum(value.nbytes for value in sample.values()))
        self._held += self._bytes[-1]
        self._lacking -= {name for name in self._lacking if len(sample[name])}
        if self._lacking:
            return
        if self._stop is not None:  # the rest has values now, too
            yield self._take(self._stop)
            self._held = sum(self._bytes)
            self._stop = None
        if self._held >= self._shard_bytes or len(self._samples) >= (self._shard_rows or np.inf):
            self._stop = len(self._samples)
            self._lacking = set(self._ragged)

    def rest(self) -> dict[str, Any]:
        """Return all that is left, at least one sample, as one shard."""
        return self._take(len(self._samples))

    def _take(self, stop: int) -> dict[str, Any]:
        taken = self._samples[:stop]
        del self._samples[:stop], self._bytes[:stop]
        return {
            name: Ragged.of([each[name] for each in taken])
            if name in self._ragged
            else np.stack([each[name] for each in taken])
            for name in taken[0]
        }
