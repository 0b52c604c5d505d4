"""Files that hold arrays (.npy, .npz, IDX, HDF5): what is in them, and opening one array."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import h5py
import numpy as np

from hpctrain.convert.sources.idx import idx_field, idx_shape, is_idx, read_idx
from hpctrain.convert.sources.source import reading
from hpctrain.data.finding.arrays import datasets_with_rows
from hpctrain.data.finding.elsewhere import require_sources
from hpctrain.data.index import HDF5_SUFFIXES
from hpctrain.data.storage import open_hdf5_file, read_attribute, require_filters
from hpctrain.errors import DatasetError
from hpctrain.utils.files import open_file, require_regular

_Header = tuple[tuple[int, ...], bool, np.dtype[Any]]


class ArrayFacts(NamedTuple):
    """What is known of an array without reading it.

    Attributes:
        shape: all axes, the samples' one included.
        dtype: as stored.
        attributes: what HDF5 keeps beside the values.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    attributes: Mapping[str, Any]


def holds_arrays(path: str) -> bool:
    """Tell whether a file of this name holds arrays."""
    return path.endswith((".npy", ".npz", *HDF5_SUFFIXES)) or is_idx(path)


def list_arrays(path: str) -> dict[str, ArrayFacts]:
    """Return the arrays of a file, by the names that they have in it.

    Raises:
        DatasetError: if the file cannot be read.
    """
    with reading(path):
        if is_idx(path):
            return {idx_field(path): ArrayFacts(*idx_shape(path), {})}
        if path.endswith(".npy"):
            with open_file(path) as file:
                facts = _npy_facts(file)
                left = Path(path).stat().st_size - file.tell()
            if left < math.prod(facts.shape) * facts.dtype.itemsize:
                raise DatasetError(
                    f"{path}: {left} bytes of values, too few for shape {facts.shape}: it is "
                    "truncated. Bring the whole file back"
                )
            return {Path(path).stem: facts}
        if path.endswith(".npz"):
            with open_file(path) as file, zipfile.ZipFile(file) as archive:
                names = [name for name in archive.namelist() if name.endswith(".npy")]
                return {name[:-4]: _npz_facts(path, archive, name) for name in names}
        return _hdf5_facts(path)


def open_array(path: str, key: str) -> Any:
    """Return an array of a file: of numpy, mapped where that is possible, or an HDF5 dataset.

    Raises:
        DatasetError: if it cannot be read.
    """
    with reading(f'{path}: field "{key}"'):
        require_regular(path)
        if is_idx(path):
            return read_idx(path)
        if path.endswith(".npy"):
            return np.load(path, mmap_mode="r", allow_pickle=False)
        if path.endswith(".npz"):
            with np.load(path, allow_pickle=False) as archive:
                return archive[key]
        return open_hdf5_file(path)[key]


def close_array(array: Any) -> None:
    """Close the file of an HDF5 dataset; arrays of numpy close theirs when they are dropped."""
    if isinstance(array, h5py.Dataset):
        array.file.close()


def plain_attributes(dataset: h5py.Dataset) -> dict[str, Any]:
    """Return the attributes that mean something outside of this file: no references, no scales."""
    kept: dict[str, Any] = {}
    for name in dataset.attrs:
        # Source: HDF5's dimension scales and netCDF-4 keep their bookkeeping under these names.
        if name in ("CLASS", "NAME", "DIMENSION_LABELS") or name.startswith("_Net"):
            continue
        try:
            value = read_attribute(dataset.attrs, name)
        except (OSError, TypeError, ValueError):  # a type that h5py does not know, or too large
            continue
        if isinstance(value, str | bytes | int | float) or (
            isinstance(value, np.generic | np.ndarray) and value.dtype.kind in "biufcSU"
        ):
            kept[name] = value
    return kept


def _hdf5_facts(path: str) -> dict[str, ArrayFacts]:
    with open_hdf5_file(path) as file:
        found = {}
        for name, dataset in datasets_with_rows(file).items():
            if dataset.is_virtual:
                require_sources(dataset)
            require_filters(dataset, path)
            found[name] = ArrayFacts(dataset.shape, dataset.dtype, plain_attributes(dataset))
        return found


def _npz_facts(path: str, archive: zipfile.ZipFile, name: str) -> ArrayFacts:
    with archive.open(name) as member:
        facts = _npy_facts(member)
        left = archive.getinfo(name).file_size - member.tell()
    if left < math.prod(facts.shape) * facts.dtype.itemsize:
        raise DatasetError(
            f"{path}: {left} bytes of values in {name}, too few for shape {facts.shape}"
        )
    return facts


def _npy_facts(file: IO[bytes]) -> ArrayFacts:
    major, _ = np.lib.format.read_magic(file)
    read: Any = (
        np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    )
    header: _Header = read(file)
    return ArrayFacts(header[0], header[2], {})
