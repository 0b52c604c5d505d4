"""Files that hold arrays (.npy, .npz, IDX, HDF5): what is in them, and opening one array."""

from __future__ import annotations

import gzip
import math
import re
import zipfile
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import h5py
import numpy as np
import numpy.typing as npt

from hpctrain.convert.sources.source import ArrayFacts, kept_attributes, reading
from hpctrain.data.files.contents import datasets_with_rows
from hpctrain.data.files.index import FURTHER_SUFFIXES, HDF5_SUFFIXES
from hpctrain.data.files.storage import open_hdf5_file, read_attribute, require_filters
from hpctrain.data.files.walking import require_sources
from hpctrain.errors import DatasetError
from hpctrain.utils.files import open_file, require_regular

_Header = tuple[tuple[int, ...], bool, np.dtype[Any]]
# Source: Yann LeCun's description of the format, http://yann.lecun.com/exdb/mnist.
_IDX_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_IDX_NAME = re.compile(r"idx\d-u?(byte|short|int|float|double)(\.gz)?$")
KNOWN = f".npy, .npz, IDX (-idx3-ubyte, also .gz), {', '.join(HDF5_SUFFIXES)}"
_IDX_FIELDS = {"images": "image", "labels": "label"}
_IMAGE_AXES = 3
"""Axes of a file of images: number, row, column."""


def holds(path: str) -> bool:
    """Tell whether this is such a file, by its name, or as HDF5 knows its files."""
    is_known = path.endswith((".npy", ".npz", *HDF5_SUFFIXES)) or is_idx(path)
    return is_known or (path.endswith(FURTHER_SUFFIXES) and h5py.is_hdf5(path))


def arrays_in(path: str, key: str | None = None) -> dict[str, ArrayFacts]:
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
        kept[name] = value
    return kept_attributes(kept)


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


def is_idx(path: str) -> bool:
    """Tell whether a file has a name like train-images-idx3-ubyte.gz."""
    return _IDX_NAME.search(path) is not None


def idx_field(path: str) -> str:
    """Return what to call the array of a file: image, label, or its own name."""
    for word, field in _IDX_FIELDS.items():
        if word in Path(path).name:
            return field
    return Path(path).name.split(".")[0]


def idx_shape(path: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and dtype of the array; grey images get an axis of one channel.

    Raises:
        DatasetError: if this is not an IDX file.
    """
    with _open_idx(path) as file:
        sizes, dtype, _ = _idx_header(path, file)
    return _with_channel(sizes), dtype


def read_idx(path: str) -> npt.NDArray[Any]:
    """Return the array, mapped from the file if it is not compressed.

    Raises:
        DatasetError: if the file is damaged or cut.
    """
    with _open_idx(path) as file:
        sizes, dtype, begin = _idx_header(path, file)
        wanted = math.prod(sizes) * dtype.itemsize
        content = file.read() if path.endswith(".gz") else None
    there = Path(path).stat().st_size - begin if content is None else len(content)
    if there != wanted:
        raise DatasetError(
            f"{path}: {there} bytes of values, where its header says {wanted}: "
            f"{'it is truncated' if there < wanted else 'it is damaged'}. Get the file again"
        )
    values: npt.NDArray[Any] = (
        np.memmap(path, dtype, "r", begin, sizes)
        if content is None
        else np.frombuffer(content, dtype).reshape(sizes)
    )
    return values.reshape(_with_channel(sizes))


def _open_idx(path: str) -> BinaryIO:
    require_regular(path)
    return cast("BinaryIO", gzip.open(path)) if path.endswith(".gz") else open_file(path)


def _idx_header(path: str, file: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Read sizes, dtype, and where the values begin."""
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _IDX_DTYPES or magic[3] == 0:
        raise DatasetError(f"{path}: this is not an IDX file: it begins with {magic.hex(' ')}")
    sizes = np.frombuffer(file.read(4 * magic[3]), ">u4")
    if len(sizes) < magic[3]:
        raise DatasetError(f"{path}: the file ends in its header. Get the file again")
    return tuple(sizes.tolist()), np.dtype(_IDX_DTYPES[magic[2]]), 4 + 4 * magic[3]


def _with_channel(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return (sizes[0], 1, *sizes[1:]) if len(sizes) == _IMAGE_AXES else sizes
