"""How HDF5 stores rows: one after the other, in chunks, or in chunks that a filter compresses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt
from h5py import h5t

from hpctrain.data.dataset import Field
from hpctrain.data.files.global_heaps import require_sound_attribute
from hpctrain.data.files.strangers import as_told
from hpctrain.errors import DatasetError, UsageError
from hpctrain.utils.files import require_regular

CHUNK_BYTES = 2**17
"""Values in one chunk, about: up to 256 lanes, training's blocks are whole numbers of such chunks.

Larger ones compress little better, and would be decompressed for a part of their rows.
"""
SMALL_FIELD = 1 / 16
"""Fields with a smaller part of a sample's bytes, such as labels, are contiguous in any case."""
LARGEST_CHUNK_BYTES = 2**32 - 1
"""Source: HDF5's file format keeps the size of a chunk in 32 bits."""
FILTERS: Mapping[str, range] = {
    "none": range(0),
    "gzip": range(10),
    "lzf": range(0),
    "zstd": range(1, 23),
    "lz4": range(0),
    "blosc2": range(10),
    "bitshuffle": range(0),
}
"""Filters by name, and the levels that each knows."""
BUILT_IN = frozenset({"none", "gzip", "lzf"})
"""Filters that come with h5py; the others come with hdf5plugin."""
_REGISTERED = {
    1: "deflate",
    2: "shuffle",
    3: "fletcher32",
    4: "szip",
    5: "nbit",
    6: "scaleoffset",
    307: "bzip2",
    32000: "lzf",
    32001: "blosc",
    32004: "lz4",
    32008: "bitshuffle",
    32015: "zstd",
    32026: "blosc2",
}
"""Source: the HDF Group's list of registered filter plugins; files call them by many names."""
INSTALL = "pip install 'hpctrain[filters]'"
HDF5_FAILURES = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
)
"""What h5py raises on a damaged file, depending on where the damage is."""


@dataclass(frozen=True, slots=True)
class Storage:
    """How the fields of new shards are stored.

    Attributes:
        filter: a name of FILTERS.
        level: of the filter; None: the filter's own default.
        chunk_bytes: values in one chunk, about; 0: contiguous, or CHUNK_BYTES with a filter.
    """

    filter: str = "none"
    level: int | None = None
    chunk_bytes: int = 0

    @classmethod
    def parse(cls, text: str, chunk_bytes: int = 0) -> Storage:
        """Return what a text such as "gzip" or "zstd:9" asks for.

        Raises:
            UsageError: if there is no such filter or level.
        """
        name, _, level = text.partition(":")
        if name not in FILTERS:
            raise UsageError(f"{name}: no such filter. There are {', '.join(FILTERS)}")
        levels = FILTERS[name]
        if level and (not level.isdecimal() or int(level) not in levels):
            known = f"levels {levels.start} to {levels.stop - 1}" if levels else "no levels"
            raise UsageError(f"{text}: the filter {name} has {known}")
        return cls(name, int(level) if level else None, chunk_bytes)

    @property
    def is_contiguous(self) -> bool:
        return self.filter == "none" and not self.chunk_bytes

    def __str__(self) -> str:
        if self.is_contiguous:
            return "contiguous"
        if self.filter == "none":
            return "chunked"
        return self.filter if self.level is None else f"{self.filter}:{self.level}"

    def require_available(self) -> None:
        """Check that the filter can be used here.

        Raises:
            DatasetError: naming the package to install.
        """
        if self.filter not in BUILT_IN and load_plugins() is None:
            raise DatasetError(
                f"the filter {self.filter} comes with hdf5plugin, which is not installed: {INSTALL}"
            )

    def chunk_rows(self, fields: Mapping[str, Field]) -> int:
        """Return how many rows make a chunk, of every field the same, so that blocks fit all."""
        most = min(self.chunk_bytes or CHUNK_BYTES, LARGEST_CHUNK_BYTES)
        return max(1, most // max(field.row_bytes for field in fields.values()))

    def keywords(self, fields: Mapping[str, Field], rows: int) -> dict[str, dict[str, Any]]:
        """Return the arguments of h5py's create_dataset by field, for so many rows."""
        if self.is_contiguous:
            return {name: {} for name in fields}
        chunk_rows = min(rows, self.chunk_rows(fields))
        small = SMALL_FIELD * sum(field.row_bytes for field in fields.values())
        return {
            name: {"chunks": (chunk_rows, *field.shape), **self._filter_keywords(field)}
            if field.row_bytes >= small
            else {}
            for name, field in fields.items()
        }

    def _filter_keywords(self, field: Field) -> dict[str, Any]:
        # Bytes of equal weight side by side compress better; single bytes are so already.
        shuffle = field.dtype.itemsize > 1
        if self.filter == "none":
            return {}
        if self.filter in BUILT_IN:
            return {"compression": self.filter, "compression_opts": self.level, "shuffle": shuffle}
        plugins = load_plugins()
        assert plugins is not None, "require_available was not called"
        if self.filter == "zstd":
            return {
                "compression": plugins.Zstd(clevel=3 if self.level is None else self.level),
                "shuffle": shuffle,
            }
        if self.filter == "lz4":
            return {"compression": plugins.LZ4(), "shuffle": shuffle}
        if self.filter == "bitshuffle":
            return {"compression": plugins.Bitshuffle(cname="lz4")}
        level = 5 if self.level is None else self.level
        return {"compression": plugins.Blosc2(cname="zstd", clevel=level)}


def load_plugins() -> ModuleType | None:
    """Make the filters of hdf5plugin known to HDF5, where it is installed."""
    plugins: ModuleType | None = None
    with suppress(ImportError):
        plugins = import_module("hdf5plugin")
    return plugins


def open_hdf5_file(path: str | Path) -> h5py.File:
    """Open a file in HDF5 for reading. Of several processes reading, none needs a lock.

    One that a program is appending to, in HDF5's mode of a single writer and many readers (SWMR),
    is opened in that mode, too; `swmr_mode` of the file says so.

    Raises:
        OSError: if the system, or HDF5, refuses; or if it is not a regular file: HDF5 would wait
            for a pipe to be written to, and hold its lock meanwhile.
    """
    require_regular(path)
    try:
        return h5py.File(path, "r", locking=False, driver="sec2")
    except OSError as error:
        if "already open for write" not in str(error):
            raise as_told(path, error) from error
        refused = error
    try:
        return h5py.File(path, "r", locking=False, driver="sec2", swmr=True)
    except OSError:
        raise OSError(
            "a program has it open for writing, or was killed while it had. Wait until it is "
            'closed; or append in SWMR mode (libver="latest", then file.swmr_mode = True); or, if '
            f"nobody writes any more, `h5clear -s {path}` (HDF5's own tool)"
        ) from refused


MOST_ATTRIBUTE_BYTES = 2**16
"""Of an attribute that is read. HDF5 itself keeps no longer ones, but in its newest format."""


def read_attribute(attributes: h5py.AttributeManager, name: str) -> Any:
    """Return an attribute, as h5py does.

    Raises:
        ValueError: if it is too large to say anything of a dataset.
        TypeError: if it is of a type that h5py does not know.
        OSError: if it cannot be read.
    """
    about = attributes.get_id(name)
    require_sound_attribute(attributes, name)
    length = 0 if about.shape is None else math.prod(about.shape) * about.dtype.itemsize
    # Of an attribute without values HDF5 reports no size, but an error.
    if length and max(length, about.get_storage_size()) > MOST_ATTRIBUTE_BYTES:
        raise ValueError(f"of {length:,} bytes, too large to be read")
    return attributes[name]


class Filter(NamedTuple):
    """One filter of a dataset, as HDF5 describes it.

    Attributes:
        number: as registered.
        values: its parameters.
        name: as the file calls it.
    """

    number: int
    values: tuple[int, ...]
    name: str

    def __str__(self) -> str:
        return _REGISTERED.get(self.number) or self.name or f"filter {self.number}"


def filters_of(dataset: h5py.Dataset) -> list[Filter]:
    """Return the filters that the chunks of a dataset went through, in their order."""
    properties = dataset.id.get_create_plist()
    found = [properties.get_filter(i) for i in range(properties.get_nfilters())]
    return [
        Filter(number, values, name.decode(errors="replace")) for number, _, values, name in found
    ]


def require_filters(dataset: h5py.Dataset, place: str) -> None:
    """Check that the chunks of a dataset can be read here.

    Raises:
        DatasetError: naming the filter, and the package that has it.
    """
    for each in filters_of(dataset):
        if h5py.h5z.filter_avail(each.number):
            continue
        load_plugins()
        if not h5py.h5z.filter_avail(each.number):
            raise DatasetError(
                f'{place}: field "{dataset.name}" went through HDF5 filter {each.number} '
                f"({each}), which is not installed: {INSTALL}"
            )


def is_known_to_numpy(dataset: h5py.Dataset) -> bool:
    """Tell whether numpy has a type for all of the values of an array."""
    try:
        _ = dataset.dtype
    except TypeError:
        return False
    return True


def dtype_of(dataset: h5py.Dataset) -> np.dtype[Any]:
    """Return the dtype of an array; of what numpy has no type for, as many bytes."""
    return _dtype_of(dataset.id.get_type())


def _dtype_of(kind: h5t.TypeID) -> np.dtype[Any]:
    try:
        known: np.dtype[Any] = kind.dtype
    except TypeError:
        if not isinstance(kind, h5t.TypeCompoundID):
            return np.dtype(f"V{kind.get_size()}")
        count = kind.get_nmembers()
        return np.dtype(
            {
                "names": [kind.get_member_name(i).decode() for i in range(count)],
                "formats": [_dtype_of(kind.get_member_type(i)) for i in range(count)],
                "offsets": [kind.get_member_offset(i) for i in range(count)],
                "itemsize": kind.get_size(),
            }
        )
    return known


def is_stored_as_in_memory(dataset: h5py.Dataset) -> bool:
    """Tell whether the values in the file are, byte for byte, those of the dataset's dtype."""
    return _is_for_bytes(dataset) or bool(
        h5t.py_create(dataset.dtype, logical=True).equal(dataset.id.get_type())
    )


def _is_for_bytes(dataset: h5py.Dataset) -> bool:
    """Tell whether HDF5 converts values to no type of numpy's, so that their bytes are taken."""
    is_bits = isinstance(dataset.id.get_type(), h5t.TypeBitfieldID)
    return is_bits or not is_known_to_numpy(dataset)


def read_box(dataset: h5py.Dataset, values: npt.NDArray[Any], box: tuple[slice, ...]) -> None:
    """Read a part of an array through HDF5, to values of its dtype in this machine's byte order.

    Args:
        dataset: that is open.
        values: to fill, of the shape of the part, one after the other in memory.
        box: from where to where along each axis, as far as it is not all of it.
    """
    if not _is_for_bytes(dataset):
        dataset.read_direct(values, source_sel=box)
        return
    whole = (*box, *(slice(None),) * (dataset.ndim - len(box)))
    bounds = [each.indices(size) for each, size in zip(whole, dataset.shape, strict=True)]
    shape = tuple(stop - start for start, stop, _ in bounds)
    there = dataset.id.get_space()
    there.select_hyperslab(tuple(start for start, _, _ in bounds), shape)
    kind = dataset.id.get_type()
    raw = np.empty(shape, f"V{kind.get_size()}")
    dataset.id.read(h5py.h5s.create_simple(shape), there, raw, kind)
    values[...] = raw.view(dtype_of(dataset))
