"""Arrays of many files, put after each other and beside each other: a table of samples.

Each kind of files is a module of the same few functions: a further one is one module more, and one
entry in FORMATS.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import h5py
import numpy as np
import numpy.typing as npt

from hpctrain.convert.sources import arrays, columns, netcdf3, zarr_stores
from hpctrain.convert.sources.source import (
    ArrayFacts,
    Arrays,
    identity_of,
    native,
    reading,
    require_same_units,
)
from hpctrain.data.arrays import Int64s
from hpctrain.data.coding import PLAIN, Coding, coding_of, without_coding
from hpctrain.data.dataset import Field
from hpctrain.data.decoding import decoded_dtype
from hpctrain.data.files.discovery import in_order
from hpctrain.data.reading.chunked import SoundChunks
from hpctrain.errors import DatasetError

WIDEST_GAP_ROWS = 32
"""HDF5 reads over gaps up to so many rows between two that are wanted, rather than twice."""
MOST_SPAN_BYTES = 64 * 2**20
"""Read in one go, what is not wanted included."""


class Format(Protocol):
    """One kind of files, as their module has it."""

    KNOWN: str
    """How files of this kind are called, for a message."""

    def holds(self, path: str) -> bool:
        """Tell whether this is such a file, or a folder that is one; at most a look inside."""
        ...

    def arrays_in(self, path: str, key: str | None = None) -> dict[str, ArrayFacts]:
        """Return the arrays of a file, by the names that they have in it.

        Args:
            path: of the file.
            key: the only one that is wanted, others may be left out; None: all.

        Raises:
            DatasetError: if it cannot be read, or a library is missing.
        """
        ...

    def open_array(self, path: str, key: str) -> Any:
        """Return an array of a file, which has a shape, an itemsize, and slices.

        Raises:
            DatasetError: if it cannot be read.
        """
        ...

    def close_array(self, array: Any) -> None:
        """Close what `open_array` has opened."""
        ...


FORMATS: tuple[Format, ...] = (zarr_stores, netcdf3, columns, arrays)
"""Those that look inside come before those that go by the name alone."""


def format_of(path: str) -> Format | None:
    """Return which kind a file is of; None: of none that is known."""
    return next((each for each in FORMATS if each.holds(path)), None)


def known() -> str:
    """Return what there is, for a message."""
    return ", ".join(each.KNOWN for each in reversed(FORMATS))


@dataclass(frozen=True, slots=True)
class Part:
    """One array of one file.

    Attributes:
        path: of the file.
        key: of the array in it.
        axis: of the samples, from 0.
        facts: of the array.
    """

    path: str
    key: str
    axis: int
    facts: ArrayFacts

    @property
    def rows(self) -> int:
        return self.facts.shape[self.axis]

    @property
    def row_shape(self) -> tuple[int, ...]:
        return self.facts.shape[: self.axis] + self.facts.shape[self.axis + 1 :]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.row_shape) * self.facts.dtype.itemsize


@dataclass(frozen=True)
class Table:
    """A source of columns, each the arrays of some files after each other.

    Attributes:
        name: what the user called it.
        columns: by field.
        to_decode: fields that are read decoded; so are those whose files say different things of
            their numbers. Of all others the numbers stay, and what is said of them.
    """

    name: str
    columns: Mapping[str, Sequence[Part]]
    to_decode: frozenset[str] = frozenset()
    # One open array a column: reading goes through the files in their order.
    _open: dict[str, tuple[Part, Any, SoundChunks]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        """Check that the parts fit together.

        Raises:
            DatasetError: if shapes, dtypes or numbers of rows differ, or there are no rows.
        """
        for name, parts in self.columns.items():
            first = parts[0]
            for part in parts:
                native(part.row_shape, part.facts.dtype, name, part.path)
                if part.rows == 0:
                    raise DatasetError(f'{part.path}: field "{name}" has no rows')
                if (part.row_shape, part.facts.dtype) != (first.row_shape, first.facts.dtype):
                    raise DatasetError(
                        f'{part.path}: field "{name}" is {_describe(part)}, but '
                        f"{_describe(first)} in {first.path}: give files that fit together"
                    )
        self._require_equal_rows()
        for name, parts in self.columns.items():
            require_same_units(name, ((part.path, part.facts.attributes) for part in parts))
        for name, codings in self._decoded.items():
            for part, coding in zip(self.columns[name], codings, strict=True):
                if coding.problem:
                    raise DatasetError(f'{part.path}: field "{name}": {coding.problem}')

    def __getstate__(self) -> dict[str, Any]:
        kept = ("name", "columns", "to_decode")
        return {**{name: getattr(self, name) for name in kept}, "_open": {}}

    @cached_property
    def _decoded(self) -> dict[str, list[Coding]]:
        """The codings of the parts, by field that is read decoded."""
        said = {
            name: [coding_of(part.facts.dtype, part.facts.attributes) for part in parts]
            for name, parts in self.columns.items()
        }
        return {
            name: codings
            for name, codings in said.items()
            if not all(each.is_plain for each in codings)
            and (name in self.to_decode or len(set(codings)) > 1)
        }

    @cached_property
    def samples(self) -> int:
        return sum(part.rows for part in next(iter(self.columns.values())))

    @cached_property
    def fields(self) -> Mapping[str, Field]:
        return {
            name: native(parts[0].row_shape, self._dtype(name), name, parts[0].path)
            for name, parts in self.columns.items()
        }

    def _dtype(self, name: str) -> np.dtype[Any]:
        stored = self.columns[name][0].facts.dtype
        codings = self._decoded.get(name)
        if codings is None:
            return stored
        viewed = {each.view(stored.newbyteorder("=")) for each in codings}
        if len(viewed) > 1 or any(each.makes_floats for each in codings):
            return decoded_dtype(next(iter(viewed)), codings)
        return viewed.pop()

    @property
    def attributes(self) -> Mapping[str, Mapping[str, Any]]:
        said = {name: parts[0].facts.attributes for name, parts in self.columns.items()}
        return {
            name: without_coding(each) if name in self._decoded else each
            for name, each in said.items()
        }

    @cached_property
    def identity(self) -> str:
        what = sorted(
            (name, part.path, part.key, part.axis)
            for name, parts in self.columns.items()
            for part in parts
        )
        paths = sorted({path for _, path, _, _ in what})
        names = sorted({(name, key, axis) for name, _, key, axis in what})
        # What 0.1.0 began to pack by the letters of names is not gone on with in another order.
        order = "" if in_order(paths) == paths else " 2 before 10"
        return f"{identity_of(paths)} {names}{order}"

    def read(self, rows: Int64s) -> Arrays:
        """Return samples, as `Source.read` does."""
        order = np.argsort(rows, kind="stable")
        ascending = rows[order]
        return {name: self._read_column(name, ascending, order) for name in self.columns}

    def close(self) -> None:
        """Close all files; reading opens them again."""
        while self._open:
            part, array, _ = self._open.popitem()[1]
            _format(part).close_array(array)

    def _read_column(self, name: str, rows: Int64s, places: Int64s) -> npt.NDArray[Any]:
        """Return rows, ascending, of a column, each at its place."""
        parts, about = self.columns[name], self.fields[name]
        out: npt.NDArray[Any] | None = None
        begin = 0
        codings = self._decoded.get(name, [PLAIN] * len(parts))
        for part, coding in zip(parts, codings, strict=True):
            i, j = np.searchsorted(rows, (begin, begin + part.rows))
            if i < j:
                array, sound = self._array(name, part)
                if out is None:  # only now is it sure that the file holds what it says
                    out = np.empty((len(rows), *about.shape), about.dtype)
                for span, values in _read_spans(name, part, array, sound, rows[i:j] - begin):
                    out[places[i:j][span]] = _values(values, coding, about.dtype)
            begin += part.rows
        assert out is not None, "no rows were asked for"
        return out

    def _array(self, name: str, part: Part) -> tuple[Any, SoundChunks]:
        """Return an array, opened, and what is known of its chunks if it is one of HDF5."""
        kept = self._open.get(name)
        if kept is not None and kept[0] is part:
            return kept[1:]
        if kept is not None:
            del self._open[name]
            _format(kept[0]).close_array(kept[1])
        array = _format(part).open_array(part.path, part.key)
        if tuple(array.shape) != part.facts.shape:
            raise DatasetError(f"{part.path}: the file has changed while it was packed")
        sound = SoundChunks()
        self._open[name] = part, array, sound
        return array, sound

    def _require_equal_rows(self) -> None:
        """Check that the columns are equally long, also within every file that several share."""
        totals = {name: sum(p.rows for p in parts) for name, parts in self.columns.items()}
        places: dict[str, dict[str, int]] = {self.name: totals}
        for name, parts in self.columns.items():
            for part in parts:
                places.setdefault(part.path, {})[name] = part.rows
        for place, counts in reversed(places.items()):
            if len(set(counts.values())) > 1:
                each = ", ".join(f"{name} {count}" for name, count in counts.items())
                raise DatasetError(
                    f"{place}: the fields have different numbers of rows: {each}. Name those that "
                    "belong together (NAME=FILES:FIELD), and the axis of the samples (--axis)"
                )


def _read_spans(
    name: str, part: Part, array: Any, sound: SoundChunks, rows: Int64s
) -> Iterator[tuple[slice, npt.NDArray[Any]]]:
    """Yield ascending rows of one array: which of them, and their values."""
    if isinstance(array, np.ndarray):
        yield slice(None), np.moveaxis(array, part.axis, 0)[rows]
        return
    most_rows = max(1, MOST_SPAN_BYTES // max(1, part.row_bytes))
    cuts = np.flatnonzero((np.diff(rows) > WIDEST_GAP_ROWS) | (np.diff(rows // most_rows) > 0))
    for begin, stop in zip([0, *(cuts + 1)], [*(cuts + 1), len(rows)], strict=True):
        first, last = int(rows[begin]), int(rows[stop - 1])
        selection = (*[slice(None)] * part.axis, slice(first, last + 1))
        with reading(f'{part.path}: field "{name}", row {first}'):
            if isinstance(array, h5py.Dataset):
                sound.require(array, {part.axis: (first, last + 1)})
            values = array[selection]
        yield slice(begin, stop), np.moveaxis(values, part.axis, 0)[rows[begin:stop] - first]


def _format(part: Part) -> Format:
    found = format_of(part.path)
    if found is None:
        raise DatasetError(f"{part.path}: the file has changed while it was packed")
    return found


def _values(stored: npt.NDArray[Any], coding: Coding, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Return the values of numbers as they are stored, of a dtype if they are decoded."""
    if coding.is_plain:
        return stored
    numbers = np.ascontiguousarray(stored, stored.dtype.newbyteorder("="))
    seen = numbers.view(coding.view(numbers.dtype))
    return coding.decode(seen, dtype) if dtype.kind == "f" else seen


def make_part(path: str, key: str, axis: int, facts: ArrayFacts) -> Part:
    """Return an array of a file as a part of a column.

    Raises:
        DatasetError: if it has no such axis.
    """
    if not -len(facts.shape) <= axis < len(facts.shape):
        raise DatasetError(
            f'{path}: field "{key}" has shape {facts.shape}: there is no axis {axis} of samples'
        )
    return Part(path, key, axis % len(facts.shape), facts)


def _describe(part: Part) -> str:
    return f"{part.facts.dtype} of shape {part.row_shape}"
