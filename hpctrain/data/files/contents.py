"""What one HDF5 file holds, as far as training needs to know: asked of HDF5 once.

Which of its arrays have rows, where their values lie, what their attributes say of their numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5t

from hpctrain.data.coding import ATTRIBUTES, PLAIN, Coding, coding_of, without_plain
from hpctrain.data.dataset import (
    ELSEWHERE,
    WHOLE,
    Field,
    Layout,
    Shard,
    require_fields,
    require_plausible,
    require_row,
    require_supported,
)
from hpctrain.data.files.form_opening import find_stored, form_in, is_categorical, is_sequence
from hpctrain.data.files.global_heaps import require_sound_fill
from hpctrain.data.files.storage import (
    HDF5_FAILURES,
    dtype_of,
    filters_of,
    is_known_to_numpy,
    is_stored_as_in_memory,
    open_hdf5_file,
    read_attribute,
    require_filters,
)
from hpctrain.data.files.type_texts import type_of
from hpctrain.data.files.walking import (
    behind_links,
    is_in,
    objects_in,
    other_files,
    require_files_behind,
)
from hpctrain.data.forms import Form, Wish
from hpctrain.errors import DatasetError
from hpctrain.utils.text import listed

OR_CHOOSE = (
    ". Or leave it out: `python -m hpctrain data info` shows what can train, and the tools take "
    "--fields"
)
LEAST_PIECE_BYTES = 1024
"""Rows that lie in smaller pieces, along a last axis or so, are better collected by HDF5."""
_BARE = "This is a netCDF dimension but not a netCDF variable"
"""Source: netCDF-4's own files; its documentation has the attribute NAME only."""


class EmptyFileError(DatasetError):
    """A file, or a group of one, without any row: of several, it is left out."""


@dataclass(frozen=True, slots=True)
class Array:
    """One HDF5 dataset.

    Attributes:
        shape: all axes.
        dtype: as stored.
        chunks: shape of a chunk; None without chunks.
        offset: bytes from the start of the file, where all of it lies there as in memory.
        reason: why only HDF5 can read it, if there is no offset.
        sources: other files that its values come from.
        coding: how its numbers stand for values; None: nobody has looked.
        form: what its rows become; None: nothing else.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunks: tuple[int, ...] | None
    offset: int | None
    reason: str
    sources: tuple[str, ...] = ()
    coding: Coding | None = None
    form: Form | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all values, as memory holds them."""
        return self.dtype.itemsize * math.prod(self.shape)

    @property
    def is_elsewhere(self) -> bool:
        """Whether the values are in other files, which may come and go by themselves."""
        return self.reason in ELSEWHERE

    def field(self, axis: int) -> Field:
        """Return what a sample is where this axis counts the samples."""
        if self.form is not None:
            return Field(*self.form.delivered(), form=self.form)
        if axis == WHOLE:
            return Field(self.shape, self.dtype)
        return Field(self.shape[:axis] + self.shape[axis + 1 :], self.dtype)

    def layout(self, axis: int) -> Layout:
        """Return where the rows lie along this axis."""
        if axis == WHOLE:
            # Readers of chunks take rows of their first axis.
            reason = self.reason.replace("chunked", "an array in chunks", 1)
            return Layout(self.offset, 1, reason)
        chunk_rows = 1 if self.chunks is None else self.chunks[axis]
        if axis:
            piece_bytes = math.prod(self.shape[axis + 1 :]) * self.dtype.itemsize
            base = self.offset if piece_bytes >= LEAST_PIECE_BYTES else None
            return Layout(None, chunk_rows, f"along axis {axis}", base)
        return Layout(self.offset, chunk_rows, self.reason)


@dataclass(frozen=True, slots=True)
class Contents:
    """One HDF5 file.

    Attributes:
        path: of the file.
        size: of the file, bytes.
        modified_ns: when it was last written to.
        checksum: xxh3-64 of the whole file, hexadecimal; None if it was never computed.
        arrays: by path inside of the file.
        grows: whether a program is appending to it.
    """

    path: str
    size: int
    modified_ns: int
    checksum: str | None
    arrays: Mapping[str, Array]
    grows: bool = False

    def shard(self, names: Sequence[str] | None, axis: int) -> tuple[Shard, dict[str, Field]]:
        """Return this file as a shard of these fields; None: of all that it holds.

        Raises:
            DatasetError: if a field is not there or cannot become a tensor, or has other rows.
        """
        wanted = list(self.arrays) if names is None else list(names)
        require_fields(wanted, self.arrays, self.path)
        arrays = {name: self.arrays[name] for name in wanted}
        for name, array in arrays.items():
            if axis == 0 and not array.shape:
                raise DatasetError(
                    f'{self.path}: field "{name}" is a single value, and has no rows: '
                    f'data.fields.{name}.axis = "none" takes it for that of its group, or file'
                )
            if axis >= len(array.shape) and axis != WHOLE:
                raise DatasetError(
                    f'{self.path}: field "{name}" has the shape {array.shape}, and no axis {axis}: '
                    f"the first one is 0, the last {len(array.shape) - 1}"
                )
        fields = {name: array.field(axis) for name, array in arrays.items()}
        for name, field in fields.items():
            try:
                require_supported(name, field, self.path)
            except DatasetError as error:
                raise DatasetError(f"{error}{OR_CHOOSE if names is None else ''}") from None
            require_row(name, field.row_bytes, self.path)
            self._require_stored(name, arrays[name])
        rows = {n: 1 if axis == WHOLE else each.shape[axis] for n, each in arrays.items()}
        samples = self._common_rows(rows)
        layouts = {name: array.layout(axis) for name, array in arrays.items()}
        sources = sorted({source for array in arrays.values() for source in array.sources})
        codings = {name: array.coding for name, array in arrays.items() if array.coding is not None}
        shard = Shard(
            path=self.path,
            samples=samples,
            size=self.size,
            checksum=self.checksum,
            layouts=layouts,
            sources=tuple(sources),
            codings=without_plain(codings) if len(codings) == len(arrays) else None,
            grows=self.grows,
        )
        return shard, fields

    def _require_stored(self, name: str, array: Array) -> None:
        """Check that the values of an array fit into what there is."""
        if array.offset is None:
            stored = self.size + sum(_size_of(source) for source in array.sources)
            require_plausible(name, array.num_bytes, self.path, stored)
        elif array.offset + array.num_bytes > self.size:
            raise DatasetError(
                f'{self.path}: field "{name}" ends at byte '
                f"{array.offset + array.num_bytes:,}, and the file at {self.size:,}: it is "
                "truncated. Bring the whole file back"
            )

    def _common_rows(self, rows: Mapping[str, int]) -> int:
        for name, count in rows.items():
            if count == 0:
                kind = DatasetError if any(rows.values()) else EmptyFileError
                raise kind(f'{self.path}: field "{name}" has no rows')
        if len(set(rows.values())) > 1:
            counts = listed([f"{name} {count}" for name, count in rows.items()], 30)
            raise DatasetError(
                f"{self.path}: the fields have different numbers of rows: {counts}. "
                "Name those that belong together: `python -m hpctrain data info` shows what there "
                "is, and the tools take --fields"
            )
        return next(iter(rows.values()), 0)


def _size_of(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0


def look_into(
    path: str,
    fields: Sequence[str] | Callable[[h5py.File], Sequence[str]] | None,
    wishes: Mapping[str, Wish] | None = None,
    axis: int = 0,
) -> Contents:
    """Return what HDF5 says of one file, of these of its datasets or of all.

    Args:
        path: of the file.
        fields: paths of datasets, or of members of compound ones, or names of `wishes`; or what
            finds them in the open file; None: all.
        wishes: what is delivered of these, by name.
        axis: that counts the rows of what is wished for.

    Raises:
        DatasetError: if it cannot be read, or a field is not there.
    """
    try:
        with open_hdf5_file(path) as file:
            named = fields(file) if callable(fields) else fields
            formed = _formed(file, named or (), wishes or {}, axis, path)
            others = None if named is None else [name for name in named if name not in formed]
            arrays = {
                name: _array_of_field(name, dataset, path)
                for name, dataset in (_wanted(file, others) if others != [] else {}).items()
            }
            arrays |= formed
            found, grows = Path(path).stat(), bool(file.swmr_mode)
    except HDF5_FAILURES as error:
        raise DatasetError(f"{path}: HDF5 cannot read this file: {error}") from error
    return Contents(path, found.st_size, found.st_mtime_ns, None, arrays, grows)


def _formed(
    file: h5py.File, fields: Sequence[str], wishes: Mapping[str, Wish], axis: int, path: str
) -> dict[str, Array]:
    """Return the arrays that are not delivered as they are stored, by name."""
    found = {}
    for name in fields:
        wish = wishes.get(name, Wish(path=name))
        dataset, members = find_stored(file, wish.path)
        if dataset is None and name in wishes:
            require_fields([wish.path.strip("/")], datasets_with_rows(file), path)
        if dataset is not None and wish.sequence and (members or not is_sequence(dataset)):
            wish = replace(wish, sequence=False)
            if wish.is_plain and not members:
                found[name] = _array_of_field(wish.path, dataset, path)
        is_stored = wish.is_plain and not members and dataset is not None
        if dataset is None or (
            is_stored and not _is_of_arrays(dataset) and not is_categorical(file.get(wish.path))
        ):
            continue
        try:
            form = form_in(file, dataset, members, wish, axis)
            coding = _coding_of_formed(dataset, members, form)
        except ValueError as error:
            raise DatasetError(f'{path}: field "{name}" is {type_of(dataset)}: {error}') from None
        array = replace(array_of(dataset, path), form=form, coding=coding)
        # One sequence is that of its group, or file.
        is_single = form.sequence and not array.shape
        found[name] = replace(array, shape=(1,)) if is_single else array
    return found


def _coding_of_formed(dataset: h5py.Dataset, members: Sequence[str], form: Form) -> Coding:
    """Return how the numbers that are delivered stand for values.

    Raises:
        ValueError: if attributes speak of numbers that are to become others.
    """
    stored = coding_in(dataset)
    if form.classes is None and form.missing is not None and not (members or stored.is_plain):
        raise ValueError(
            "its attributes tell already which numbers are missing, and their format: leave dtype "
            "and missing out"
        )
    if form.missing is not None:
        return Coding(missing=(form.missing,))
    return stored if form.classes is None else PLAIN


def _is_of_arrays(dataset: h5py.Dataset) -> bool:
    """Tell whether each value is an array itself, whose axes are behind those of the others."""
    return isinstance(dataset.id.get_type(), h5t.TypeArrayID)


def _wanted(file: h5py.File, fields: Sequence[str] | None) -> dict[str, h5py.Dataset]:
    """Return HDF5 datasets of an open file by their paths, links followed for those named."""
    if fields is not None:
        named = {}
        for name in fields:
            try:
                require_files_behind(file, name)
                if name in file:
                    named[name] = file[name]
            except ValueError:  # a name that HDF5 cannot have
                continue
            except (KeyError, OSError, RuntimeError) as error:
                raise DatasetError(
                    f'{file.filename}: field "{name}" is a link that leads to nothing: {error}'
                ) from error
        if len(named) == len(fields) and all(map(_holds_values, named.values())):
            return named
    there = datasets_with_rows(file)
    wanted = list(there) if fields is None else list(fields)
    require_fields(wanted, there, file.filename)
    return {name: there[name] for name in wanted}


def _array_of_field(name: str, dataset: h5py.Dataset, path: str) -> Array:
    if not is_known_to_numpy(dataset):
        raise DatasetError(
            f'{path}: field "{name}" is {type_of(dataset)}, which cannot become a tensor as it '
            "stands: `python -m hpctrain data info` says which keys it needs"
        )
    return array_of(dataset, path)


def array_of(dataset: h5py.Dataset, path: str) -> Array:
    """Return what HDF5 says of an open dataset in the file at a path.

    Raises:
        DatasetError: if its chunks went through a filter that is not here.
        OSError: if its fill value is where HDF5 would read for ever.
    """
    require_sound_fill(dataset)
    if dataset.chunks is not None:
        require_filters(dataset, path)
    if not is_in(dataset, path):
        reason = "in another file, by a link"
    elif dataset.chunks is not None:
        reason = ", ".join(["chunked", *map(str, filters_of(dataset))])
    else:
        reason = _obstacle(dataset)
    offset = None if reason else dataset.id.get_offset()
    sources = tuple(other_files(dataset, path))
    return Array(
        shape=dataset.shape,
        dtype=dtype_of(dataset),
        chunks=dataset.chunks,
        offset=offset,
        reason=reason,
        sources=sources,
        coding=coding_in(dataset),
    )


def datasets_with_rows(file: h5py.File) -> dict[str, h5py.Dataset]:
    """Return the datasets of an open file that have an axis, by one of the paths to each.

    A file may be nothing but links to others: then those that they lead to.

    Raises:
        DatasetError: if there are none.
    """
    # Bytes are names that are not UTF-8: no config can have them.
    there: dict[str, h5py.Dataset] = {
        name: item
        for name, item in objects_in(file)
        if isinstance(name, str) and _holds_rows(item) and not is_bare_dimension(item)
    }
    if not there:
        there = {name: found for name, found in behind_links(file).items() if _holds_rows(found)}
    if not there:
        raise EmptyFileError(f"{file.filename}: there is no HDF5 dataset with rows in this file")
    return there


def _holds_values(item: object) -> bool:
    return isinstance(item, h5py.Dataset) and item.shape is not None


def _holds_rows(item: object) -> bool:
    return isinstance(item, h5py.Dataset) and item.shape is not None and item.ndim > 0


def _obstacle(dataset: h5py.Dataset) -> str:
    """Return why the rows of a dataset without chunks do not lie in the file as in memory."""
    if dataset.is_virtual:
        return "virtual"
    if dataset.external:
        return "in an external file"
    if dataset.id.get_space_status() != h5py.h5d.SPACE_STATUS_ALLOCATED:
        # The offset that HDF5 reports may then be a number that means nothing.
        return "without storage, all fill value"
    if dataset.id.get_offset() is None:
        return "compact"
    if not is_stored_as_in_memory(dataset):
        return "in a number format that only HDF5 converts"
    return ""


def is_bare_dimension(dataset: h5py.Dataset) -> bool:
    """Tell whether an array is no variable of a netCDF file, but the length of an axis."""
    return text_attribute(dataset, "NAME").startswith(_BARE)


def text_attribute(dataset: h5py.Dataset, name: str) -> str:
    """Return an attribute that is text; empty: there is none such."""
    try:
        value = read_attribute(dataset.attrs, name) if name in dataset.attrs else ""
    except (OSError, TypeError, ValueError, RuntimeError, KeyError):
        return ""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value if isinstance(value, str) else ""


def units_in(path: str, names: Iterable[str]) -> dict[str, str]:
    """Return the units of those arrays of a file that say them."""
    found = {}
    try:
        with open_hdf5_file(path) as file:
            for name in names:
                there = file.get(name)
                if isinstance(there, h5py.Dataset) and (unit := text_attribute(there, "units")):
                    found[name] = unit
    except (OSError, ValueError, RuntimeError):
        pass  # another kind of file, or one that needs options to be opened
    return found


def coding_in(dataset: h5py.Dataset) -> Coding:
    """Return how the numbers of an open HDF5 dataset stand for values."""
    dtype = dtype_of(dataset)
    if dtype.kind not in "iuf":
        return PLAIN
    there = dataset.attrs
    said = {name: _value(there, name) for name in ATTRIBUTES if name in there}
    if said and "units" in there:
        said["units"] = _value(there, "units")
    return coding_of(dtype, said)


def _value(attributes: h5py.AttributeManager, name: str) -> Any:
    try:
        return read_attribute(attributes, name)
    except (OSError, TypeError):  # a type that h5py does not know
        return "of a type that cannot be read"
    except ValueError as error:
        return str(error)
