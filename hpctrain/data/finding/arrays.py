"""What HDF5 says of the arrays of a file: which have rows, and where their values lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import h5py

from hpctrain.data.dataset import require_fields
from hpctrain.data.finding.attributes import coding_in, is_bare_dimension
from hpctrain.data.finding.contents import Array, Contents
from hpctrain.data.finding.elsewhere import behind_links, is_in, other_files
from hpctrain.data.finding.links import require_files_behind
from hpctrain.data.finding.types import type_of
from hpctrain.data.finding.walking import objects_in
from hpctrain.data.storage import (
    HDF5_FAILURES,
    filters_of,
    is_stored_as_in_memory,
    open_hdf5_file,
    require_filters,
)
from hpctrain.errors import DatasetError


def look_into(path: str, fields: Sequence[str] | None) -> Contents:
    """Return what HDF5 says of one file, of these of its datasets or of all.

    Raises:
        DatasetError: if it cannot be read, or a field is not there.
    """
    try:
        with open_hdf5_file(path) as file:
            arrays = {
                name: _array_of_field(name, dataset, path)
                for name, dataset in _wanted(file, fields).items()
            }
            found = Path(path).stat()
    except HDF5_FAILURES as error:
        raise DatasetError(f"{path}: HDF5 cannot read this file: {error}") from error
    return Contents(path, found.st_size, found.st_mtime_ns, None, arrays)


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
        if len(named) == len(fields) and all(map(_holds_rows, named.values())):
            return named
    there = datasets_with_rows(file)
    wanted = list(there) if fields is None else list(fields)
    require_fields(wanted, there, file.filename)
    return {name: there[name] for name in wanted}


def _array_of_field(name: str, dataset: h5py.Dataset, path: str) -> Array:
    try:
        return array_of(dataset, path)
    except TypeError:
        raise DatasetError(
            f'{path}: field "{name}" is {type_of(dataset)}, which cannot become a tensor'
        ) from None


def array_of(dataset: h5py.Dataset, path: str) -> Array:
    """Return what HDF5 says of an open dataset in the file at a path.

    Raises:
        DatasetError: if its chunks went through a filter that is not here.
    """
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
        dtype=dataset.dtype,
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
        raise DatasetError(f"{file.filename}: there is no HDF5 dataset with rows in this file")
    return there


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
