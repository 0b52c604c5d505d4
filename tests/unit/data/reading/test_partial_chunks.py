"""Chunks that reach over the edge of the data, which `H5Pset_chunk_opts` may leave unfiltered."""

from __future__ import annotations

import ctypes
from contextlib import closing
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers.filter_chains import CHAINS, properties_of

from hpctrain.data import open_dataset
from hpctrain.data.reading import filter_libraries, other_axis, shards
from hpctrain.data.reading.rows import read_rows
from hpctrain.data.view import Part

SHAPE, CHUNK = (25, 7, 9), (10, 4, 4)


def set_chunk_options(properties: h5py.h5p.PropDCID) -> None:
    library = ctypes.CDLL(h5py.h5p.__file__)
    assert library.H5Pset_chunk_opts(ctypes.c_int64(properties.id), ctypes.c_uint(2)) >= 0


def write(path: Path, chain: str, *, unfiltered: bool = True) -> np.ndarray[Any, Any]:
    """Write an array under a chain of filters, its partial chunks without; return it."""
    properties = properties_of(chain, CHUNK)
    if unfiltered:
        set_chunk_options(properties)
    content = (np.arange(np.prod(SHAPE), dtype="<i4") // 9).reshape(SHAPE)
    with h5py.File(path, "w", libver="latest") as file:
        space = h5py.h5s.create_simple(SHAPE)
        made = h5py.h5d.create(file.id, b"x", h5py.h5t.STD_I32LE, space, properties)
        made.write(h5py.h5s.ALL, h5py.h5s.ALL, content)
    return content


@pytest.fixture
def reads_by_hdf5(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that HDF5 was asked for."""
    rows: list[int] = []
    read = shards.ShardReader._read_by_hdf5

    def counted(self: Any, shard: Any, name: str, field: Any, first: int, out: Any) -> None:
        rows.extend(range(first, first + len(out)))
        read(self, shard, name, field, first, out)

    monkeypatch.setattr(shards.ShardReader, "_read_by_hdf5", counted)
    return rows


@pytest.mark.parametrize("unfiltered", [True, False])
@pytest.mark.parametrize("chain", CHAINS)
def test_as_hdf5_reads_them(
    tmp_path: Path, chain: str, unfiltered: bool, reads_by_hdf5: list[int]
) -> None:
    content = write(tmp_path / "a.h5", chain, unfiltered=unfiltered)
    with h5py.File(tmp_path / "a.h5") as file:
        assert (file["x"][:] == content).all()
    dataset = open_dataset(str(tmp_path))
    assert (read_rows(dataset, np.arange(25))["x"] == content).all()
    assert dataset.slow_fields() == {}
    assert reads_by_hdf5 == []


@pytest.mark.parametrize("unfiltered", [True, False])
@pytest.mark.parametrize("chain", ["shuffle", "shuffle+gzip", "bitshuffle"])
def test_where_the_library_cannot_be_asked(
    tmp_path: Path,
    chain: str,
    unfiltered: bool,
    reads_by_hdf5: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """HDF5 reads the partial chunks that could be either: those of the size of their values."""
    content = write(tmp_path / "a.h5", chain, unfiltered=unfiltered)
    monkeypatch.setattr(filter_libraries, "loaded_function", lambda name: None)
    assert (read_rows(open_dataset(str(tmp_path)), np.arange(25))["x"] == content).all()
    assert bool(reads_by_hdf5) == (unfiltered or chain != "shuffle+gzip")


def test_data_that_grew(tmp_path: Path) -> None:
    """A chunk that was partial, and no longer is, has been filtered since."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((4,))
    properties.set_shuffle()
    set_chunk_options(properties)
    with h5py.File(tmp_path / "a.h5", "w", libver="latest") as file:
        space = h5py.h5s.create_simple((6,), (h5py.h5s.UNLIMITED,))
        made = h5py.h5d.create(file.id, b"x", h5py.h5t.STD_I32LE, space, properties)
        grown = h5py.Dataset(made)
        grown[:] = np.arange(6)
        for size in (11, 7, 14):
            grown.resize((size,))
            grown[5:] = np.arange(5, size)
    content = read_rows(open_dataset(str(tmp_path)), np.arange(14))["x"]
    assert (content == np.arange(14)).all()


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("chain", CHAINS)
def test_along_another_axis(
    tmp_path: Path, chain: str, axis: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = write(tmp_path / "a.h5", chain)
    monkeypatch.delattr(other_axis.OtherAxisReader, "_read_by_hdf5")
    dataset = open_dataset(str(tmp_path), ["x"], axis)
    rows = np.array([[0, 2], [6, 1], [3, 3], [1, 6]])
    out = np.full((12, dataset.fields["x"].row_bytes), 0xAA, np.uint8)
    with closing(other_axis.OtherAxisReader(Part(dataset, axis))) as reader:
        reader.read_runs("x", *rows.T, out, np.array([0, 2, 3, 6]))
        assert reader.files_opened == 1
    expected = np.moveaxis(content, axis, 0)
    wanted = [row for first, count in rows for row in range(first, first + count)]
    found = out.view("<i4").reshape(12, *expected.shape[1:])
    assert (found == expected[wanted]).all()
