"""Files as other programs and versions write them hold for us what h5py reads from them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import pytest

from hpctrain.convert.index import make_catalogue, make_index
from hpctrain.data.dataset import SUPPORTED_DTYPES
from hpctrain.data.files.contents import datasets_with_rows
from hpctrain.data.files.discovery import open_dataset
from hpctrain.data.reading.rows import read_rows

EARLY, INCREMENTAL = h5py.h5d.ALLOC_TIME_EARLY, h5py.h5d.ALLOC_TIME_INCR
FIXED, GROWS_ONCE, GROWS = 0, 1, 2
"""Axes that are unlimited decide how HDF5 lists chunks: fixed array, extensible array, B-tree."""


def numbers(shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
    return (np.arange(np.prod(shape)) * 7 % 101).reshape(shape).astype(dtype)


def low_level(
    file: h5py.File,
    name: str,
    chunk: tuple[int, ...],
    *,
    growing: int = FIXED,
    allocation: int = INCREMENTAL,
    filters: bool = False,
    some: bool = False,
    dtype: str = "<i4",
) -> None:
    """Write an array of (11, 5, 7) as HDF5's own interface allows, or only a part of it."""
    shape = (11, 5, 7)
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk(chunk)
    properties.set_alloc_time(allocation)
    properties.set_fill_value(np.array(-3, dtype))
    if filters:
        properties.set_shuffle()
        properties.set_deflate(1)
    most = tuple(
        h5py.h5s.UNLIMITED if axis < growing else max(size, part)
        for axis, (size, part) in enumerate(zip(shape, chunk, strict=True))
    )
    space = h5py.h5s.create_simple(shape, most)
    kind = h5py.h5t.py_create(np.dtype(dtype))
    made = h5py.Dataset(h5py.h5d.create(file.id, name.encode(), kind, space, properties))
    if some:
        made[2:4, 1:3] = numbers((2, 2, 7), dtype)
    else:
        made[:] = numbers(shape, dtype)


def by_h5py(path: Path, libver: str) -> None:
    with h5py.File(path, "w", libver=libver) as file:
        file.create_group("chunked")
        chunks = [(11, 5, 7), (16, 8, 8), (1, 5, 7), (4, 2, 3)]
        ways = itertools.product(
            chunks, (FIXED, GROWS_ONCE, GROWS), (EARLY, INCREMENTAL), (False, True), (False, True)
        )
        for number, (chunk, growing, allocation, filters, some) in enumerate(ways):
            dtype = ("<i4", ">i2", "<f8", ">f4")[number % 4]
            low_level(
                file,
                f"chunked/{number}",
                chunk,
                growing=growing,
                allocation=allocation,
                filters=filters,
                some=some,
                dtype=dtype,
            )
        compact = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        compact.set_layout(h5py.h5d.COMPACT)
        space = h5py.h5s.create_simple((11, 2))
        made = h5py.h5d.create(file.id, b"compact", h5py.h5t.STD_U16BE, space, compact)
        h5py.Dataset(made)[:] = numbers((11, 2), ">u2")
        file.create_dataset("contiguous", data=numbers((11, 3), ">c8"))
        file.create_dataset("nothing written", (11, 3), ">f4", fillvalue=2.5)
        file.create_dataset("flags", data=numbers((11, 3), "i4") % 2 == 0)
        file.create_dataset("half", data=numbers((11, 3), ">f2"), chunks=(2, 2), compression="lzf")
        raw = path.with_suffix(".raw")
        with raw.open("wb") as beside:
            beside.write(numbers((11, 3), ">i4").tobytes())
        external = [(str(raw), 0, h5py.h5f.UNLIMITED)]
        file.create_dataset("external", (11, 3), ">i4", external=external)
        layout = h5py.VirtualLayout((11, 5), "<f8", maxshape=(None, 5))
        layout[:7, :3] = h5py.VirtualSource(".", "virtual source", (7, 3))
        file["virtual source"] = numbers((7, 3), "<f8")
        file.create_virtual_dataset("virtual", layout, fillvalue=-1)


def by_netcdf4(path: Path) -> None:
    netcdf = pytest.importorskip("netCDF4")
    with netcdf.Dataset(path, "w") as file:
        for name, size in (("time", None), ("level", 3), ("y", 19), ("x", 23)):
            file.createDimension(name, size)
        group = file.createGroup("surface")
        ways: dict[str, dict[str, Any]] = {
            "plain": {"contiguous": True, "dimensions": ("level", "y", "x")},
            "zlib": {"zlib": True, "shuffle": False},
            "shuffled": {"zlib": True, "fletcher32": True, "chunksizes": (2, 2, 10, 10)},
            "summed": {"fletcher32": True},
            "big": {"endian": "big", "zlib": True},
            "rounded": {"zlib": True, "significant_digits": 3},
            "zstd": {"compression": "zstd"},
            "bzip2": {"compression": "bzip2", "shuffle": False},
            "szip": {"compression": "szip"},
            "blosc": {"compression": "blosc_lz4"},
        }
        for number, (name, options) in enumerate(ways.items()):
            home = group if number % 2 else file
            dimensions = options.pop("dimensions", ("time", "level", "y", "x"))
            kind = "f4" if name == "rounded" else ("i2", "f8", "u1", "i4")[number % 4]
            kind = f">{kind}" if name == "big" else kind
            try:
                made = home.createVariable(name, kind, dimensions, fill_value=9, **options)
            except RuntimeError:  # this build has no such filter
                continue
            made.set_auto_maskandscale(False)
            shape = (3, 19, 23) if len(dimensions) == 3 else (5, 3, 19, 23)
            made[:] = numbers(shape, kind)


def by_pytables(path: Path) -> None:
    tables = pytest.importorskip("tables")
    with tables.open_file(str(path), "w") as file:
        file.create_array("/", "array", numbers((11, 3), "f4"))
        file.create_array("/", "turned", numbers((11, 3), ">f4"))
        for library in ("bzip2", "blosc", "blosc:zstd", "zlib"):
            bits = library == "blosc:zstd"
            filters = tables.Filters(
                complevel=5,
                complib=library,
                shuffle=not bits,
                bitshuffle=bits,
                fletcher32=library in ("zlib", "blosc"),
            )
            name = library.replace(":", "_")
            file.create_carray("/", name, obj=numbers((11, 70), "i8"), filters=filters)
        grown = file.create_earray("/", "grown", tables.Int16Atom(), (0, 5, 7), filters=filters)
        for first in (0, 9):
            grown.append(numbers((20, 5, 7), "i2") + first)


MAKERS: dict[str, Callable[[Path], None]] = {
    "h5py, earliest format": functools.partial(by_h5py, libver="earliest"),
    "h5py, latest format": functools.partial(by_h5py, libver="latest"),
    "netCDF4": by_netcdf4,
    "PyTables": by_pytables,
}


@pytest.mark.parametrize("maker", MAKERS)
def test_every_value(tmp_path: Path, maker: str) -> None:
    assert hdf5plugin.PLUGIN_PATH  # its filters are known to HDF5
    (tmp_path / "shards").mkdir()
    path = tmp_path / "shards" / "a.h5"
    MAKERS[maker](path)
    catalogue = tmp_path / "all.json"
    make_catalogue(str(path), catalogue, jobs=1)
    with h5py.File(path) as file:
        expected = {
            name: dataset[()]
            for name, dataset in datasets_with_rows(file).items()
            if dataset.dtype.name in SUPPORTED_DTYPES and dataset.size
        }
    assert len(expected) > 5
    for length in {len(values) for values in expected.values()}:
        names = [name for name, values in expected.items() if len(values) == length]
        make_index(str(path.parent), names, jobs=1)
        rows = np.random.default_rng(0).permutation(length)
        for source in (str(path), str(path.parent), str(catalogue)):
            dataset = open_dataset(source, names)
            for name, found in read_rows(dataset, rows).items():
                values = expected[name]
                assert found.dtype == values.dtype.newbyteorder("="), name
                place = (name, dataset.shards[0].layouts[name])
                assert np.array_equal(found, values[rows]), place
